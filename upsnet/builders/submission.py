"""From a recipe to the archives for the evaluation server of its data set."""

from collections.abc import Iterable
from pathlib import Path

from upsnet.config import Recipe
from upsnet.evaluation.cityscapes_submission import write_cityscapes_submission
from upsnet.evaluation.coco_submission import write_coco_submission
from upsnet.structures.categories import Categories
from upsnet.structures.errors import RecipeError
from upsnet.structures.results import Prediction


def no_submission(recipe: Recipe) -> str | None:
    """Why the results of this recipe's test are none that a server takes, and what to do; None if they are."""
    options = recipe.dataset
    if options.limit is not None:
        return (
            f"dataset.limit is {options.limit}, a submission needs every image of {options.test_image_set}: "
            f"set it to null and run the test again"
        )
    if "+" in options.test_image_set:
        return (
            f"dataset.test_image_set: {options.test_image_set} are several image sets, a submission is of one: "
            f"choose one and run the test on it"
        )
    if options.dataset == "Cityscapes" and options.test_image_set not in ("val", "test"):
        return f"dataset.test_image_set: no server scores {options.test_image_set} of Cityscapes: choose val or test"
    return None


def write_submission(
    recipe: Recipe, results: Path, predictions: Iterable[Prediction], categories: Categories, name: str
) -> list[Path]:
    """Packs stored results into `results`/submission, as the server of the recipe's data set wants them.

    Args:
        predictions: those stored in `results`, one for each photo of the image set.
        name: of the method, a part of COCO's file names.

    Returns:
        The archives.

    Raises:
        RecipeError: see `no_submission`.
        DataError: the results are damaged or lack a part.
        PlaceError: a file cannot be read or written, or the disk is full.
    """
    if reason := no_submission(recipe):
        raise RecipeError(reason)
    image_set, out = recipe.dataset.test_image_set, results / "submission"
    if recipe.dataset.dataset == "Cityscapes":
        return write_cityscapes_submission(predictions, categories, image_set, out)
    return write_coco_submission(results, predictions, image_set, name, out)
