"""No key without effect: what the schema accepts, some code reads."""

import ast
import textwrap
from pathlib import Path

from upsnet.config.original_keys import ONE_VALUE
from upsnet.config.schema import SECTIONS, recipe_keys

PACKAGE = Path(__file__).resolve().parent.parent.parent / "upsnet"
CHECKED_BY_THE_SCHEMA = {"network.num_anchors", "system"}
ROOT = "recipe"
SECTION_OF_CLASS = {"Recipe": ROOT, **{options.__name__: section for section, options in SECTIONS.items()}}


def reading_code() -> list[Path]:
    """The code that may see a recipe: the upper floors, and the part of config/ that acts on keys."""
    upper = [path for room in ("builders", "commands") for path in (PACKAGE / room).glob("*.py")]
    return [*PACKAGE.glob("*.py"), *upper, PACKAGE / "config" / "load.py", PACKAGE / "config" / "paths.py"]


def keys_read(tree: ast.AST) -> set[str]:
    """Dotted keys that some function reads: `recipe.train.lr`, or `train.lr` after `train = recipe.train`."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {key for function in functions for key in _keys_of_function(function)}


def _keys_of_function(function: ast.FunctionDef) -> set[str]:
    sections = {"recipe": {ROOT}}
    for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs):
        annotation = ast.walk(argument.annotation) if argument.annotation else ()
        named = {node.id for node in annotation if isinstance(node, ast.Name)}
        if found := {SECTION_OF_CLASS[name] for name in named & SECTION_OF_CLASS.keys()}:
            sections[argument.arg] = found
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            sections.update(_aliases(node, sections))
    keys = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute):
            owners = _sections_of(node.value, sections)
            keys |= {node.attr if owner == ROOT else f"{owner}.{node.attr}" for owner in owners}
    return keys


def _aliases(node: ast.Assign, sections: dict[str, set[str]]) -> dict[str, set[str]]:
    """Names that stand for sections from here on: `train = recipe.train`, `a, b = recipe.train, recipe.test`."""
    target = node.targets[0]
    both = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
    pairs = zip(target.elts, node.value.elts, strict=True) if both else [(target, node.value)]
    named = {name.id: _sections_of(value, sections) for name, value in pairs if isinstance(name, ast.Name)}
    return {name: found for name, found in named.items() if found}


def _sections_of(value: ast.expr, sections: dict[str, set[str]]) -> set[str]:
    if isinstance(value, ast.Name):
        return sections.get(value.id, set())
    if isinstance(value, ast.Attribute) and value.attr in SECTIONS and ROOT in _sections_of(value.value, sections):
        return {value.attr}
    return set()


def test_every_key_is_read():
    read = set().union(*(keys_read(ast.parse(path.read_text(encoding="utf-8"))) for path in reading_code()))
    keys = set(recipe_keys())
    unread = keys - set(ONE_VALUE) - CHECKED_BY_THE_SCHEMA - read
    assert not unread, f"nothing reads these recipe keys: {', '.join(sorted(unread))}"
    assert not CHECKED_BY_THE_SCHEMA & read and not set(ONE_VALUE) & read


def test_a_key_is_read_only_from_its_own_section():
    code = """
    def plain(recipe):
        return recipe.seed + recipe.train.lr

    def aliases(recipe):
        options = recipe.dataset
        network, test = recipe.network, recipe.test
        return options.limit, network.mask_size, test.max_det

    def argument(options: TrainOptions | TestOptions, other: LoopOptions, bare):
        return options.scales, other.wd, bare.flip

    def unrelated(train, recipes):
        return train.momentum, recipes.test.vis_mask
    """
    found = keys_read(ast.parse(textwrap.dedent(code))) - set(SECTIONS)
    assert found == {
        "seed", "train.lr", "dataset.limit", "network.mask_size", "test.max_det", "train.scales", "test.scales",
    }  # fmt: skip
