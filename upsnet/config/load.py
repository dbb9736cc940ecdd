"""Yaml files and overrides → `Recipe`, and back.

A recipe is a pile of layers, later ones winning key by key: the files named by `base`, the file itself, the overrides.
Lists are replaced as a whole.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from upsnet.config.messages import Layers, explain, file_of, yaml_word
from upsnet.config.original_keys import NO_EFFECT, ONE_VALUE
from upsnet.config.schema import SECTIONS, Recipe
from upsnet.config.yaml_text import read_section, read_yaml, write_yaml
from upsnet.structures.errors import RecipeError

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
OVERRIDES = "the overrides"

Tree = dict[str, Any]

logger = logging.getLogger("upsnet")


def load_recipe(recipe: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        recipe: a yaml file, or the bare name of a shipped recipe such as `upsnet_resnet50_coco_16gpu`.
        overrides: `["train.lr=0.005", "test.scales=[480]"]` with yaml values, or `{"train.lr": 0.005}`.

    Raises:
        RecipeError: a file is missing or not yaml, a key is unknown, a value is of the wrong type or impossible.
    """
    path = _find(str(recipe), Path())
    layers = _read_layers(path, [])
    layers.append((OVERRIDES, _override_tree(overrides)))
    return _build(layers, str(path), name=path.name.partition(".")[0])


def shipped_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return [path.stem for path in sorted(EXPERIMENTS.glob("[!_]*.yaml"))]


def dump_recipe(recipe: Recipe) -> str:
    """Yaml with every key, from which `load_recipe` makes an equal recipe."""
    return write_yaml(recipe.model_dump(mode="json"))


def _find(name: str, folder: Path) -> Path:
    """The file of this name: relative to the folder, else among the shipped recipes if it is a bare name."""
    candidates = [folder / name]
    if Path(name).name == name:
        candidates += [EXPERIMENTS / name, EXPERIMENTS / f"{name}.yaml"]
    for path in candidates:
        if path.is_file():
            return path
    shipped = ", ".join(shipped_recipes())
    raise RecipeError(f"recipe {candidates[0]} is not there: give the path of a yaml file or one of {shipped}")


def _read_layers(path: Path, below: list[Path]) -> Layers:
    """The layers of a file, its bases first. `below`: the files that led here."""
    if path.resolve() in below:
        chain = " → ".join(file.name for file in [*below, path])
        raise RecipeError(f"{path}: 'base' leads back to a file that builds on it ({chain}): remove one of them")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as a yaml file: {error}") from None
    tree = _normalise(read_section(text, str(path)))
    bases = tree.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise RecipeError(f"key 'base' in {path}: must be the name of a yaml file or a list of names, got {bases!r}")
    layers: Layers = []
    for base in bases:
        try:
            base_path = _find(base, path.parent)
        except RecipeError as error:
            raise RecipeError(f"key 'base' in {path}: {error}") from None
        layers += _read_layers(base_path, [*below, path.resolve()])
    return [*layers, (str(path), tree)]


def _normalise(tree: Mapping[Any, Any]) -> Tree:
    """Keys as text; a section without content, which yaml reads as null, is empty."""
    normal: Tree = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            value = _normalise(value)
        normal[str(key)] = {} if value is None and key in SECTIONS else value
    return normal


def _override_tree(overrides: Sequence[str] | Mapping[str, Any]) -> Tree:
    tree: Tree = {}
    for key, value in _override_pairs(overrides):
        branch: Any = value
        for part in reversed(key.split(".")):
            branch = {part: branch}
        tree = _merge(tree, _normalise(branch))
    return tree


def _override_pairs(overrides: Sequence[str] | Mapping[str, Any]) -> list[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        return [(key, list(value) if isinstance(value, tuple) else value) for key, value in overrides.items()]
    if isinstance(overrides, str):
        overrides = [overrides]
    pairs = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"override '{override}' must have the form key=value, such as train.lr=0.005")
        pairs.append((key.strip(), read_yaml(text, f"override '{override}'")))
    return pairs


def _merge(below: Tree, above: Tree) -> Tree:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = _merge(under, value) if isinstance(value, dict) and isinstance(under, dict) else value
    return merged


def _build(layers: Layers, source: str, name: str) -> Recipe:
    if file := file_of(["base"], layers):
        raise RecipeError(f"key 'base' in {file}: only a yaml file can build on another one")
    tree: Tree = {section: {} for section in SECTIONS}
    for _, layer in layers:
        tree = _merge(tree, layer)
    tree = _without_idle_keys(tree, source)
    tree["name"] = tree.get("name") or name
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(explain(error, layers, source)) from None
    _check_single_values(recipe, layers)
    return _debugged(recipe) if recipe.debug_mode else recipe


def _without_idle_keys(tree: Tree, source: str) -> Tree:
    """The tree without the keys that have no effect; one warning names them."""
    idle = [dotted for dotted in NO_EFFECT if _has(tree, dotted)]
    if not idle:
        return tree
    logger.warning("%s: these keys have no effect: %s", source, ", ".join(idle))
    return {
        section: {key: value for key, value in keys.items() if f"{section}.{key}" not in idle}
        if isinstance(keys, dict)
        else keys
        for section, keys in tree.items()
    }


def _has(tree: Tree, dotted: str) -> bool:
    section, _, key = dotted.partition(".")
    return isinstance(tree.get(section), dict) and key in tree[section]


def _check_single_values(recipe: Recipe, layers: Layers) -> None:
    for dotted, advice in ONE_VALUE.items():
        section, _, key = dotted.partition(".")
        value, only = getattr(getattr(recipe, section), key), SECTIONS[section].model_fields[key].default
        if value != only:
            file = file_of([section, key], layers)
            rule = f"{yaml_word(value)} is not supported, only {yaml_word(only)}"
            raise RecipeError(f"key '{dotted}' in {file}: {rule}: {advice}")


def _debugged(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"gpus": "0", "train": recipe.train.model_copy(update={"use_horovod": False})})
