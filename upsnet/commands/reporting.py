"""`upsnet report`: the page of a trained and tested recipe."""

from pathlib import Path

from tqdm import tqdm

from upsnet import builders
from upsnet.config import Recipe, paths
from upsnet.dataset.coco_panoptic import CocoPanoptic
from upsnet.engine.log import read_metrics
from upsnet.evaluation.error_analysis import ErrorAnalysis
from upsnet.evaluation.json_files import read_json
from upsnet.evaluation.panoptic_quality import match_segments, quality_of
from upsnet.evaluation.result_files import read_results
from upsnet.report import GalleryItem, choose_images, write_report
from upsnet.structures.errors import DataError
from upsnet.structures.results import Prediction

GALLERY_SIZE = 24
"""Photos in the gallery of a report."""


def report(recipe: Recipe, folder: Path | None = None) -> Path:
    """Writes the report of a trained and tested recipe: one page with scores, curves and a gallery.

    Args:
        folder: where to; default: `report` beside the results.

    Returns:
        The path of the page.

    Raises:
        UserError: there are no stored results, or they do not fit the data.
    """
    results = paths.results_folder(recipe)
    folder = folder or results.parent / "report"
    dataset = builders.build_test_set(recipe)
    if not dataset.has_truth:
        raise DataError(f"{recipe.dataset.test_image_set} has no labels: a report is of a test on images with labels")
    analysis = ErrorAnalysis(dataset.categories)
    position = {image_id: i for i, image_id in enumerate(dataset.image_ids.tolist())}
    qualities: dict[int, float] = {}
    for prediction in tqdm(read_results(results, dataset.categories), "report", len(position), unit="image"):
        if prediction.image_id not in position:
            raise DataError(f"{results}: image {prediction.image_id} is not in the data set: run the test again")
        truth = dataset.truth(position[prediction.image_id])
        matching = match_segments(prediction, truth, dataset.categories)
        analysis.add(prediction, truth, matching)
        qualities[prediction.image_id] = quality_of(matching)
    shown = choose_images(qualities, GALLERY_SIZE)
    gallery = [
        _gallery_item(dataset, position[prediction.image_id], prediction)
        for prediction in read_results(results, dataset.categories)
        if prediction.image_id in shown
    ]
    page = write_report(
        folder,
        title=recipe.name,
        subtitle=f"{len(qualities)} images of {recipe.dataset.test_image_set}, {recipe.dataset.dataset_path}",
        categories=dataset.categories,
        summary=read_json(results / "summary.json"),
        error_summary=analysis.summary(),
        history=read_metrics(paths.training_folder(recipe) / "metrics.jsonl"),
        gallery=gallery,
    )
    print(f"report: {page}")
    return page


def _gallery_item(dataset: CocoPanoptic, i: int, prediction: Prediction) -> GalleryItem:
    truth = dataset.truth(i)
    matching = match_segments(prediction, truth, dataset.categories)
    causes = ErrorAnalysis(dataset.categories).add(prediction, truth, matching)
    return GalleryItem(dataset.photo(i), truth, prediction, matching, quality_of(matching), causes)
