"""`upsnet test`: predictions of the test images, stored and scored."""

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from upsnet import builders
from upsnet.checkpoints.files import read_weights
from upsnet.commands.startup import say_where
from upsnet.commands.submitting import pack
from upsnet.config import Recipe, paths
from upsnet.dataset.coco_panoptic import CocoPanoptic
from upsnet.dataset.views import PhotoViews
from upsnet.engine.inference_loop import SharedEvaluator, predict_batches, run_share, run_test
from upsnet.engine.log import logging_to
from upsnet.engine.workers import Workers
from upsnet.evaluation.result_files import PngNames, ResultWriter, read_results, write_summary
from upsnet.evaluation.result_parts import PartWriter, check_parts, read_parts
from upsnet.evaluation.tables import summary_tables
from upsnet.structures.errors import DataError
from upsnet.structures.pictures import write_png
from upsnet.structures.results import OUTPUTS, Output, Prediction, Truth
from upsnet.visualize import draw_panoptic

logger = logging.getLogger("upsnet")


def test(recipe: Recipe, weights: Path | None = None, eval_only: bool = False) -> dict[str, Any]:
    """Tests weights on the recipe's test images: stores the results, scores them, prints the tables.

    Results of images without labels are packed for the evaluation server instead of scored. Several workers share the
    images out; files and scores are those of one. Only rank 0 scores, prints and writes the summary; with `eval_only`
    it does all.

    Args:
        weights: default: the recipe's own last snapshot.
        eval_only: score what an earlier test stored; no weights are read.

    Returns:
        The content of `results/summary.json`; empty with `test.vis_mask`, which draws pictures and scores nothing,
        without labels, and on other workers than rank 0.

    Raises:
        UserError: the recipe, the data, the weights, the stored results or the place to write to is at fault.
    """
    folder = paths.results_folder(recipe)
    workers, device = builders.build_workers(recipe, for_training=False)
    is_first = workers.rank == 0
    log_file = paths.log_file(recipe, paths.testing_folder(recipe), datetime.now()) if is_first else None
    with closing(workers), logging_to(log_file, is_first):
        dataset = builders.build_test_set(recipe)
        if eval_only and not dataset.has_truth and not recipe.test.vis_mask:
            raise DataError(
                f"{recipe.dataset.test_image_set} has no labels to score stored results with: "
                f"pack them for the evaluation server by `upsnet submission`"
            )
        if eval_only and not is_first:
            return {}
        if eval_only:
            predictions: Iterable[Prediction] = read_results(folder, dataset.categories)
            image_ids = dataset.image_ids.tolist()
        else:
            network = _network(recipe, dataset, weights or paths.default_weights(recipe), device, workers.count)
            loader = builders.build_test_loader(recipe, dataset, workers.rank, workers.count)
            outputs: frozenset[Output] = frozenset({"panoptic"}) if recipe.test.vis_mask else OUTPUTS
            predictions = predict_batches(network, loader, recipe.test.precision, outputs)
            image_ids = builders.test_order(recipe, dataset, workers.rank, workers.count)
        if recipe.test.vis_mask:
            run_test(predictions, image_ids, writer=_PictureWriter(folder / "vis", dataset), show=is_first)
            return {}
        evaluators = builders.build_evaluators(recipe, dataset.categories, folder) if dataset.has_truth else {}
        if workers.count > 1 and not eval_only:
            _run_with_others(predictions, image_ids, recipe, dataset, evaluators, workers)
        else:
            with nullcontext() if eval_only else ResultWriter(folder, dataset.categories) as writer:
                run_test(predictions, image_ids, truth_of(dataset), evaluators.values(), writer)
        if not is_first:
            return {}
        if not dataset.has_truth:
            logger.info("%s has no labels: nothing is scored; results: %s", recipe.dataset.test_image_set, folder)
            if reason := builders.no_submission(recipe):
                logger.info("not packed for the evaluation server: %s", reason)
            else:
                pack(recipe, dataset, recipe.name)
            return {}
        summary = {name: evaluator.summary() for name, evaluator in evaluators.items()}
        path = write_summary(folder, summary)
        print(summary_tables(summary))
        logger.debug("scores by class\n%s", summary_tables(summary, per_class=True))  # into the log file only
        logger.info("scores: %s", path)
        return summary


def _network(recipe: Recipe, dataset: CocoPanoptic, weights: Path, device: torch.device, workers: int) -> nn.Module:
    """The trained network, made ready for a test; says what will be tested."""
    network = builders.build_network(recipe, dataset.categories)
    builders.load_trained(recipe, network, read_weights(weights), dataset.categories)
    say_where(device)
    logger.info("testing %s on %d images of %s", weights, dataset.num_photos, recipe.dataset.dataset_path)
    if workers > 1:
        logger.info("%d workers share the images out", workers)
    _say_views(recipe, dataset)
    return builders.prepare_for_test(recipe, network.to(device))


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


def truth_of(dataset: CocoPanoptic) -> Callable[[int], Truth]:
    """From an image id to its truth."""
    position = {image_id: i for i, image_id in enumerate(dataset.image_ids.tolist())}
    return lambda image_id: dataset.truth(position[image_id])


def _run_with_others(
    predictions: Iterable[Prediction],
    image_ids: list[int],
    recipe: Recipe,
    dataset: CocoPanoptic,
    evaluators: Mapping[str, SharedEvaluator],
    workers: Workers,
) -> None:
    """Stores and measures this worker's images; rank 0 then gives the files of all their names, and counts."""
    folder, categories = paths.results_folder(recipe), dataset.categories
    order, is_first = builders.test_order(recipe, dataset), workers.rank == 0
    names, file_names = PngNames(), dict(zip(dataset.image_ids.tolist(), dataset.file_names, strict=True))
    png_names = {image_id: names.of(image_id, file_names[image_id]) for image_id in order}
    with ResultWriter(folder, categories) if is_first else nullcontext() as writer:
        workers.gather(None)  # an earlier test's index is gone, before the first of its PNGs is written over
        with PartWriter(folder, workers.rank, png_names, categories) as part:
            workers.gather(None)  # all parts are begun
            if is_first:
                check_parts(folder, workers.count)
            run_share(predictions, image_ids, part, truth_of(dataset), evaluators, show=is_first)
        workers.gather(None)  # all parts are finished
        if writer is not None:
            for stored, measured in read_parts(folder, workers.count, order):
                writer.add_records(stored)
                for name, evaluator in evaluators.items():
                    evaluator.count(measured[name])


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
