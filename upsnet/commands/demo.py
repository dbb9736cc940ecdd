"""`upsnet shapes` and `upsnet demo`: the synthetic data set, and the whole road on it."""

import time
from collections.abc import Sequence
from pathlib import Path

from upsnet.commands.reporting import report
from upsnet.commands.testing import test
from upsnet.commands.training import train
from upsnet.config import load_recipe
from upsnet.dataset.shapes import write_shapes


def shapes(out: Path, train: int, val: int, seed: int) -> None:
    """Writes the synthetic data set, see `write_shapes`."""
    write_shapes(out, train, val, seed)
    print(f"{train} + {val} images in {out}")


DEMO_RECIPE = "upsnet_resnet18_shapes"
DEMO_TRAIN, DEMO_VAL, DEMO_SEED = 1500, 100, 1


def demo(overrides: Sequence[str] = ()) -> Path:
    """The whole road: makes `shapes`, trains on it, tests on images never seen, writes the report.

    Args:
        overrides: changes to the demo's recipe, e.g. `["train.max_iteration=5000"]`.
    """
    began = time.monotonic()
    recipe = load_recipe(DEMO_RECIPE, overrides)
    write_shapes(Path(recipe.dataset.dataset_path), DEMO_TRAIN, DEMO_VAL, DEMO_SEED)
    weights = train(recipe)
    test(recipe, weights)
    page = report(recipe)
    minutes = (time.monotonic() - began) / 60
    print(f"the demo took {minutes:.1f} minutes; open {page} in a browser")
    return page
