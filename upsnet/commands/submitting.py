"""`upsnet submission`: stored results as the evaluation server wants them."""

from pathlib import Path

from upsnet import builders
from upsnet.config import Recipe, paths
from upsnet.dataset.coco_panoptic import CocoPanoptic
from upsnet.engine.inference_loop import one_for_each
from upsnet.evaluation.result_files import read_results


def submission(recipe: Recipe, name: str | None = None) -> list[Path]:
    """Packs the results of an earlier test of the recipe; needs neither weights nor photos' labels.

    Args:
        name: of the method, a part of COCO's file names; default: the recipe's name.

    Returns:
        The archives, in `results/submission`.

    Raises:
        UserError: there are no complete results of the whole image set, or the archives cannot be written.
    """
    return pack(recipe, builders.build_test_set(recipe), name or recipe.name)


def pack(recipe: Recipe, dataset: CocoPanoptic, name: str) -> list[Path]:
    """Packs the stored results of a data set; see `submission`."""
    results = paths.results_folder(recipe)
    stored = one_for_each(dataset.image_ids.tolist(), read_results(results, dataset.categories), "submission")
    files = builders.write_submission(recipe, results, stored, dataset.categories, name)
    for file in files:
        print(f"submission: {file}")
    return files
