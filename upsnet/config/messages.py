"""One clear sentence for each way in which a recipe can be wrong: the key, the file, what to do."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from upsnet.config.schema import SECTIONS, Recipe, recipe_keys

Layers = list[tuple[str, dict[str, Any]]]
"""(file, keys) in the order of merging: later ones win."""

_RULES = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "tuple_type": "must be a list",
    "too_short": "needs at least {min_length} value(s)",
    "too_long": "takes at most {max_length} value(s)",
    "missing": "needs more values",
    "model_type": "must be a section of keys",
    "literal_error": "must be {expected}",
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "value_error": "{error}",
}
"""pydantic's error types in our words; the fields are those of the error's context."""


def explain(error: ValidationError, layers: Layers, source: str) -> str:
    """The sentence for a refused recipe.

    Args:
        error: pydantic's complaint about the merged layers.
        layers: the last one that has a key is to blame for it.
        source: the file that the user asked for.
    """
    # A misspelt key leaves the right one missing, so what is missing is told last.
    rank = {"extra_forbidden": 0, "missing": 2}
    first = min(error.errors(include_url=False), key=lambda detail: rank.get(detail["type"], 1))
    return _sentence(first, layers, source)


def nearest_key(dotted: str) -> str:
    """The known key that looks most like this one: of the same name in any section, else of the same section."""
    known = ["base", *recipe_keys(), *SECTIONS]
    section, _, last = dotted.rpartition(".")
    namesakes = [key for key in known if key.rpartition(".")[2] == last]
    neighbours = [key for key in known if section and key.startswith(f"{section}.")]
    return difflib.get_close_matches(dotted, namesakes or neighbours or known, n=1, cutoff=0.0)[0]


def file_of(path: Sequence[str], layers: Layers) -> str | None:
    """The file that has the last word on a key (section, key); None if no layer has the key."""
    return next((file for file, tree in reversed(layers) if _holds(tree, path)), None)


def _sentence(detail: ErrorDetails, layers: Layers, source: str) -> str:
    # Numbers in the location are positions in a list.
    path = [part for part in detail["loc"] if isinstance(part, str)]
    dotted = ".".join(path)
    where = file_of(path, layers) or source
    if detail["type"] == "extra_forbidden":
        return f"unknown key '{dotted}' in {where}: the nearest known key is '{nearest_key(dotted)}'"
    if detail["type"] == "missing" and len(path) == len(detail["loc"]):
        return f"{source} lacks the key '{dotted}' ({_meaning(path)}): add it"
    context = detail.get("ctx", {})
    rule = _RULES[detail["type"]].format(**context) if detail["type"] in _RULES else detail["msg"]
    value = "" if isinstance(detail["input"], Mapping) else f", got {yaml_word(detail['input'])}"
    return f"key '{dotted}' in {where}: {rule}{value}"


def _holds(tree: Any, path: Sequence[str]) -> bool:
    for key in path:
        if not isinstance(tree, Mapping) or key not in tree:
            return False
        tree = tree[key]
    return True


def _meaning(path: Sequence[str]) -> str:
    options = SECTIONS[path[0]] if len(path) > 1 else Recipe
    return str(options.model_fields[path[-1]].description)


def yaml_word(value: Any) -> str:
    """A value as the user may have written it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(list(value) if isinstance(value, tuple) else value)
