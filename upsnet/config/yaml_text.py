"""Yaml text ↔ plain values, refusing what yaml would pass over in silence."""

import re
from typing import Any

import yaml

from upsnet.structures.errors import RecipeError


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that refuses doubled keys and reads 1e-4 as a number, as yaml 1.2 does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key '{key.value}' stands twice in one section"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper that quotes a text which `_Loader` would read as a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def read_yaml(text: str, source: str) -> Any:
    """The value of a yaml text: mappings, lists, text, numbers, booleans, None.

    Raises:
        RecipeError: not yaml, or a key stands twice; the message names `source` and the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{source}{line}: this is not valid yaml: {problem}") from None
    except ValueError as error:  # a word that looks like a date and is none
        raise RecipeError(f"{source}: this is not valid yaml: {error}") from None


def read_section(text: str, source: str) -> dict[str, Any]:
    """The mapping that a yaml text holds; an empty text is an empty mapping.

    Raises:
        RecipeError: see `read_yaml`; or the text holds something else than keys and values.
    """
    tree = read_yaml(text, source)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise RecipeError(f"{source}: a recipe consists of `key: value` lines, this is a {type(tree).__name__}")
    return tree


def write_yaml(tree: dict[str, Any]) -> str:
    """The yaml text from which `read_section` makes an equal mapping."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
