"""The table of all recipe keys as markdown, made from the schema: `docs/recipes.md`."""

import json
import typing
from typing import Any

from pydantic.fields import FieldInfo

from upsnet.config.original_keys import NO_EFFECT, ONE_VALUE
from upsnet.config.schema import SECTIONS, Recipe

_HEAD = """# Recipes

A recipe is a yaml file; `python -m upsnet.config` prints this page. Every key can be overridden on the command line:
`train.lr=0.005 test.scales=[480]`. Unknown keys and wrong types are refused.

`base` names another yaml file, or a list of them, that this one builds on: beside the file, or the bare name of a
shipped recipe. Later files win key by key, lists are replaced as a whole.
"""
_NO_EFFECT_HEAD = """## Keys without effect

Keys of the original UPSNet that change nothing there either. They are accepted and named in one warning.
"""
_ONE_VALUE_HEAD = """## Keys with one value

Keys of the original UPSNet of which only the default is supported.
"""


def recipe_page() -> str:
    """The whole page: one table for each section of the schema, then the original's remaining keys."""
    top = {key: field for key, field in Recipe.model_fields.items() if key not in SECTIONS}
    parts = [_HEAD, "## Top level\n", _table(top)]
    for section, options in SECTIONS.items():
        fields = {key: field for key, field in options.model_fields.items() if f"{section}.{key}" not in ONE_VALUE}
        parts += [f"## `{section}`: {Recipe.model_fields[section].description}\n", _table(fields)]
    single = [(f"`{key}`", f"`{_yaml_value(_default(key))}`", advice) for key, advice in ONE_VALUE.items()]
    parts += [_ONE_VALUE_HEAD, _rows(("key", "value", "why"), single)]
    parts += [_NO_EFFECT_HEAD, _rows(("key", "meant for"), [(f"`{key}`", use) for key, use in NO_EFFECT.items()])]
    return "\n".join(parts)


def _default(dotted: str) -> Any:
    section, _, key = dotted.partition(".")
    return SECTIONS[section].model_fields[key].default


def _table(fields: dict[str, FieldInfo]) -> str:
    rows = [(f"`{key}`", _default_cell(field), _meaning(field)) for key, field in fields.items()]
    return _rows(("key", "default", "meaning"), rows)


def _rows(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *rows)]
    return "\n".join(lines) + "\n"


def _default_cell(field: FieldInfo) -> str:
    return "required" if field.is_required() else f"`{_yaml_value(field.default)}`"


def _meaning(field: FieldInfo) -> str:
    choices = [choice for choice in _choices(field.annotation) if choice is not None]
    listed = " (" + ", ".join(f"`{choice}`" for choice in choices) + ")" if choices else ""
    return f"{field.description}{listed}"


def _choices(annotation: Any) -> list[Any]:
    """The values of a Literal, also within a union."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return list(arguments)
    return [choice for argument in arguments if not isinstance(argument, str) for choice in _choices(argument)]


def _yaml_value(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)
