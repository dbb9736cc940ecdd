"""The typed schema of a recipe, the reading of recipes, and the places where a run puts its files."""

from upsnet.config.load import dump_recipe, load_recipe, shipped_recipes
from upsnet.config.schema import DatasetOptions, NetworkOptions, Recipe, TestOptions, TrainOptions

__all__ = [
    "DatasetOptions",
    "NetworkOptions",
    "Recipe",
    "TestOptions",
    "TrainOptions",
    "dump_recipe",
    "load_recipe",
    "shipped_recipes",
]
