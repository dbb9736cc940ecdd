"""`upsnet test`: predictions of the test images, stored and scored."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

from upsnet import builders
from upsnet.checkpoints.files import read_weights
from upsnet.commands.startup import say_where
from upsnet.commands.submitting import pack
from upsnet.config import Recipe, paths
from upsnet.dataset.coco_panoptic import CocoPanoptic
from upsnet.dataset.views import PhotoViews
from upsnet.engine.inference_loop import predict_batches, run_test
from upsnet.engine.log import logging_to
from upsnet.evaluation.result_files import ResultWriter, read_results, write_summary
from upsnet.evaluation.tables import summary_tables
from upsnet.structures.errors import DataError
from upsnet.structures.pictures import write_png
from upsnet.structures.results import OUTPUTS, Output, Prediction
from upsnet.visualize import draw_panoptic

logger = logging.getLogger("upsnet")


def test(recipe: Recipe, weights: Path | None = None, eval_only: bool = False) -> dict[str, Any]:
    """Tests weights on the recipe's test images: stores the results, scores them, prints the tables.

    Results of images without labels are packed for the evaluation server instead of scored.

    Args:
        weights: default: the recipe's own last snapshot.
        eval_only: score what an earlier test stored; no weights are read.

    Returns:
        The content of `results/summary.json`; empty with `test.vis_mask`, which draws pictures and scores nothing, and
        without labels.

    Raises:
        UserError: the recipe, the data, the weights, the stored results or the place to write to is at fault.
    """
    folder = paths.results_folder(recipe)
    with logging_to(paths.log_file(recipe, paths.testing_folder(recipe), datetime.now())):
        dataset = builders.build_test_set(recipe)
        if eval_only and not dataset.has_truth and not recipe.test.vis_mask:
            raise DataError(
                f"{recipe.dataset.test_image_set} has no labels to score stored results with: "
                f"pack them for the evaluation server by `upsnet submission`"
            )
        if eval_only:
            predictions: Iterable[Prediction] = read_results(folder, dataset.categories)
        else:
            outputs: frozenset[Output] = frozenset({"panoptic"}) if recipe.test.vis_mask else OUTPUTS
            predictions = _fresh_predictions(recipe, dataset, weights or paths.default_weights(recipe), outputs)
        if recipe.test.vis_mask:
            run_test(predictions, dataset.image_ids.tolist(), writer=_PictureWriter(folder / "vis", dataset))
            return {}
        if not dataset.has_truth:
            _store(predictions, dataset, folder)
            logger.info("%s has no labels: nothing is scored; results: %s", recipe.dataset.test_image_set, folder)
            if reason := builders.no_submission(recipe):
                logger.info("not packed for the evaluation server: %s", reason)
            else:
                pack(recipe, dataset, recipe.name)
            return {}
        summary = _score(predictions, dataset, folder, recipe, store=not eval_only)
        path = write_summary(folder, summary)
        print(summary_tables(summary))
        logger.debug("scores by class\n%s", summary_tables(summary, per_class=True))  # into the log file only
        logger.info("scores: %s", path)
        return summary


def _fresh_predictions(
    recipe: Recipe, dataset: CocoPanoptic, weights: Path, outputs: frozenset[Output]
) -> Iterator[Prediction]:
    device = builders.choose_device(recipe)
    network = builders.build_network(recipe, dataset.categories)
    builders.load_trained(recipe, network, read_weights(weights), dataset.categories)
    say_where(device)
    logger.info("testing %s on %d images of %s", weights, dataset.num_photos, recipe.dataset.dataset_path)
    _say_views(recipe, dataset)
    loader = builders.build_test_loader(recipe, dataset)
    prepared = builders.prepare_for_test(recipe, network.to(device))
    return predict_batches(prepared, loader, recipe.test.precision, outputs)


def _say_views(recipe: Recipe, dataset: CocoPanoptic) -> None:
    views = builders.test_views(recipe)
    if views.count > 1:
        scales, mirrored = ", ".join(map(str, recipe.test.scales)), ", also mirrored" if recipe.test.flip else ""
        logger.info("each image is seen in %d views: short sides %s%s", views.count, scales, mirrored)
    fewer = sum(len(sizes) < len(recipe.test.scales) for sizes in PhotoViews(dataset, views).padded_sizes())
    if fewer:
        logger.warning(
            "test.max_size=%d brings scales of %d of the %d images to the same size: these are seen in fewer views; "
            "a larger test.max_size avoids it",
            recipe.test.max_size,
            fewer,
            dataset.num_photos,
        )


def _store(predictions: Iterable[Prediction], dataset: CocoPanoptic, folder: Path) -> None:
    with ResultWriter(folder, dataset.categories) as writer:
        run_test(predictions, dataset.image_ids.tolist(), writer=writer)


def _score(
    predictions: Iterable[Prediction], dataset: CocoPanoptic, folder: Path, recipe: Recipe, store: bool
) -> dict[str, Any]:
    position = {image_id: i for i, image_id in enumerate(dataset.image_ids.tolist())}
    evaluators = builders.build_evaluators(recipe, dataset.categories, folder)
    with ResultWriter(folder, dataset.categories) if store else nullcontext() as writer:
        run_test(predictions, position, lambda i: dataset.truth(position[i]), evaluators.values(), writer)
    return {name: evaluator.summary() for name, evaluator in evaluators.items()}


class _PictureWriter:
    """Draws predictions instead of storing them."""

    def __init__(self, folder: Path, dataset: CocoPanoptic) -> None:
        self._folder, self._dataset = folder, dataset
        self._position = {image_id: i for i, image_id in enumerate(dataset.image_ids.tolist())}

    def add(self, prediction: Prediction) -> None:
        assert prediction.segment_map is not None
        photo = self._dataset.photo(self._position[prediction.image_id])
        picture = draw_panoptic(photo, prediction.segment_map, prediction.segments, self._dataset.categories)
        # Photos of two folders may share a name.
        name = Path(prediction.file_name).with_suffix(".png").as_posix().replace("/", "_")
        write_png(self._folder / name, picture)
