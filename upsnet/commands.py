"""One function a command: recipe → builders → engine → files. The only room that knows all others."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from upsnet import builders
from upsnet.checkpoints.resnet import load_pretrained
from upsnet.config import Recipe, dump_recipe, load_recipe, paths
from upsnet.dataset.coco_panoptic import CocoPanoptic
from upsnet.dataset.loading import BatchLoader
from upsnet.dataset.shapes import write_shapes
from upsnet.engine.inference_loop import Evaluator, predict_batches, run_test
from upsnet.engine.log import TrainingLog, logging_to, read_metrics
from upsnet.engine.options import LoopOptions
from upsnet.engine.snapshots import ResumeState, Snapshots, complete_snapshots, resume
from upsnet.engine.train import train as run_training
from upsnet.evaluation.coco_files import evaluate_files
from upsnet.evaluation.error_analysis import ErrorAnalysis
from upsnet.evaluation.instance_ap import InstanceAP
from upsnet.evaluation.json_files import read_json
from upsnet.evaluation.panoptic_quality import PanopticQuality, match_segments, quality_of
from upsnet.evaluation.result_files import ResultWriter, read_results, write_summary
from upsnet.evaluation.semantic_iou import SemanticIoU
from upsnet.evaluation.tables import summary_tables
from upsnet.operators import describe
from upsnet.predict import load_predictor, load_trained
from upsnet.report import GalleryItem, choose_images, write_report
from upsnet.structures.errors import DataError, PlaceError, RecipeError, WeightsError
from upsnet.structures.pictures import write_png
from upsnet.structures.results import Prediction
from upsnet.structures.sample import Batch
from upsnet.visualize import draw_batch, draw_panoptic

logger = logging.getLogger("upsnet")


# -- train -------------------------------------------------------------------------------------------------------------


def train(recipe: Recipe) -> Path:
    """Trains a recipe and returns the path of the last snapshot's weights.

    Raises:
        UserError: the recipe, the data, the weights or the place to write to is at fault.
    """
    if recipe.train.begin_iteration > 0 and not recipe.train.resume:
        raise RecipeError(
            f"train.begin_iteration is {recipe.train.begin_iteration}, but train.resume is false: "
            f"set train.resume=true to go on from that step, or leave train.begin_iteration out"
        )
    now = datetime.now()
    folder = paths.training_folder(recipe)
    with logging_to(paths.log_file(recipe, folder, now)):
        device = builders.choose_device(recipe)
        dataset = builders.build_training_set(recipe)
        network = builders.build_network(recipe, dataset.categories).to(device)
        optimizer = builders.build_optimizer_of(recipe, network)
        options = builders.engine_options(recipe, len(dataset))
        _say_where(device)
        _say_how_many_workers(recipe)
        start = _starting_point(recipe, network, optimizer)
        _say_what_is_trained(recipe, dataset, network, options)
        _say_what_will_not_come(recipe)
        snapshots = Snapshots(folder, recipe.model_prefix, dataset.categories, dump_recipe(recipe))
        if start is None and ((folder / "metrics.jsonl").exists() or complete_snapshots(folder)):
            logger.warning("an earlier run in %s is replaced; train.resume=true would go on with it", folder)
        validation = _validation_batches(recipe, dataset) if recipe.train.eval_data else None
        begin = start.iteration if start else 0
        tensorboard = paths.tensorboard_folder(recipe, now)
        with TrainingLog(folder / "metrics.jsonl", tensorboard, begin) as log:
            run_training(
                network,
                builders.build_training_loader(recipe, dataset, begin),
                optimizer,
                options,
                snapshots,
                log,
                start,
                validation,
                on_first_batch=lambda batch: _draw_first_batch(batch, dataset, folder),
            )
        return snapshots.path(options.max_iteration)


def _say_where(device: torch.device) -> None:
    logger.info("running on %s; %s", builders.device_name(device), describe())


def _say_how_many_workers(recipe: Recipe) -> None:
    if recipe.train.use_horovod:
        reason = "train.use_horovod is true"
    elif "," in recipe.gpus:
        reason = "gpus lists several devices"
    else:
        return
    logger.info("%s, but this is a plain launch: one worker, without Horovod", reason)
    if recipe.train.total_batch is None:
        count = recipe.train.batch_size
        logger.info("train.total_batch is not set: a step sees %d images; set it if train.lr belongs to more", count)


def _starting_point(recipe: Recipe, network: nn.Module, optimizer: torch.optim.Optimizer) -> ResumeState | None:
    """Puts weights into the network: those of the snapshot that is resumed, else the pretrained ones, if any."""
    if recipe.train.resume:
        start = resume(paths.snapshot_file(recipe, recipe.train.begin_iteration), network, optimizer)
        if start.iteration >= recipe.train.max_iteration:
            raise RecipeError(
                f"train.max_iteration is {recipe.train.max_iteration}, but the snapshot to resume from has "
                f"{start.iteration} steps already: raise it"
            )
        logger.info("resuming after step %d", start.iteration)
        return start
    if recipe.network.pretrained is not None:
        _check_pretrained(recipe, Path(recipe.network.pretrained))
        report = load_pretrained(network, Path(recipe.network.pretrained))
        logger.info("%s: %d tensors loaded", recipe.network.pretrained, len(report.loaded))
        for what, names in (("not used", report.left_out), ("of another shape", list(report.other_shape))):
            if names:
                logger.info("%s: %s: %s", recipe.network.pretrained, what, ", ".join(names))
    return None


def _check_pretrained(recipe: Recipe, path: Path) -> None:
    if not path.is_file():
        depth = recipe.symbol.split("_")[1]
        raise WeightsError(
            f"network.pretrained: there is no weight file {path}: put a ResNet-{depth} there, or train from scratch "
            f"with network.pretrained=null network.backbone_fix_bn=false network.backbone_freeze_at=0"
        )


def _say_what_will_not_come(recipe: Recipe) -> None:
    train = recipe.train
    if train.lr_schedule == "step" and train.decay_iteration and train.decay_iteration[0] >= train.max_iteration:
        what, step = "decay_iteration", train.decay_iteration[0]
    elif train.warmup_iteration >= train.max_iteration:
        what, step = "warmup_iteration", train.warmup_iteration
    else:
        return
    logger.warning(
        "train.%s is %d, but training ends at step %d: the schedule belongs to a longer training",
        what,
        step,
        train.max_iteration,
    )


def _say_what_is_trained(recipe: Recipe, dataset: CocoPanoptic, network: nn.Module, options: LoopOptions) -> None:
    logger.info(
        "data: %d images (%d entries with mirrored copies) of %s, %d thing and %d stuff classes",
        dataset.num_photos,
        len(dataset),
        recipe.dataset.dataset_path,
        dataset.categories.num_things,
        dataset.categories.num_stuff,
    )
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    logger.info("parameters: %.2f of %.2f million are trained", trained / 1e6, _count_parameters(network) / 1e6)
    logger.info("losses: %s", ", ".join(f"{weight:g} {name}" for name, weight in options.loss_weights.items()))
    batch_size = recipe.train.batch_size
    logger.info(
        "total batch %d = 1 worker × %d images × %d micro-batches; %d steps an epoch, %d steps in all",
        batch_size * options.accumulation,
        batch_size,
        options.accumulation,
        options.steps_per_epoch,
        options.max_iteration,
    )


def _validation_batches(recipe: Recipe, training_set: CocoPanoptic) -> BatchLoader:
    dataset = builders.build_test_set(recipe, targets=True)
    if dataset.categories != training_set.categories:
        raise DataError(
            f"{recipe.dataset.dataset_path}: {recipe.dataset.test_image_set} has other categories than "
            f"{recipe.dataset.image_set}: correct one of the panoptic json files"
        )
    return builders.build_test_loader(recipe, dataset)


def _count_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _draw_first_batch(batch: Batch, dataset: CocoPanoptic, folder: Path) -> None:
    assert dataset.transform is not None
    path = folder / "first_batch.png"
    write_png(path, draw_batch(batch, dataset.categories, dataset.transform.picture))
    logger.info("the first batch as the network sees it: %s", path)


# -- test --------------------------------------------------------------------------------------------------------------


def test(recipe: Recipe, weights: Path | None = None, eval_only: bool = False) -> dict[str, Any]:
    """Tests weights on the recipe's test images: stores the results, scores them, prints the tables.

    Args:
        weights: default: the recipe's own last snapshot.
        eval_only: score what an earlier test stored; no weights are read.

    Returns:
        The content of `results/summary.json`; empty with `test.vis_mask`, which draws pictures and scores nothing.

    Raises:
        UserError: the recipe, the data, the weights, the stored results or the place to write to is at fault.
    """
    folder = paths.results_folder(recipe)
    with logging_to(paths.log_file(recipe, paths.testing_folder(recipe), datetime.now())):
        dataset = builders.build_test_set(recipe)
        if eval_only:
            predictions: Iterable[Prediction] = read_results(folder, dataset.categories)
        else:
            predictions = _fresh_predictions(recipe, dataset, weights or paths.default_weights(recipe))
        if recipe.test.vis_mask:
            run_test(predictions, dataset.image_ids.tolist(), writer=_PictureWriter(folder / "vis", dataset))
            return {}
        summary = _score(predictions, dataset, folder, store=not eval_only)
        path = write_summary(folder, summary)
        print(summary_tables(summary))
        logger.debug("scores by class\n%s", summary_tables(summary, per_class=True))  # into the log file only
        logger.info("scores: %s", path)
        return summary


def _fresh_predictions(recipe: Recipe, dataset: CocoPanoptic, weights: Path) -> Iterator[Prediction]:
    device = builders.choose_device(recipe)
    network = builders.build_network(recipe, dataset.categories)
    load_trained(network, weights, dataset.categories)
    _say_where(device)
    logger.info("testing %s on %d images of %s", weights, dataset.num_photos, recipe.dataset.dataset_path)
    loader = builders.build_test_loader(recipe, dataset)
    return predict_batches(network.to(device), loader, recipe.test.precision)


def _score(predictions: Iterable[Prediction], dataset: CocoPanoptic, folder: Path, store: bool) -> dict[str, Any]:
    position = {image_id: i for i, image_id in enumerate(dataset.image_ids.tolist())}
    instances = InstanceAP(dataset.categories, folder, store)
    evaluators: dict[str, Evaluator] = {
        "panoptic": PanopticQuality(dataset.categories),
        "instances": instances,
        "semantic": SemanticIoU(dataset.categories),
    }
    try:
        with ResultWriter(folder, dataset.categories) if store else nullcontext() as writer:
            parts = run_test(predictions, position, lambda i: dataset.truth(position[i]), evaluators, writer)
    except BaseException:
        instances.discard()
        raise
    return {"panoptic": parts["panoptic"], **parts["instances"], "semantic": parts["semantic"]}


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


# -- report ------------------------------------------------------------------------------------------------------------

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


# -- the rest ----------------------------------------------------------------------------------------------------------


def predict(recipe: Recipe, weights: Path, photos: Sequence[Path], out: Path) -> None:
    """Predicts photos: for each, panoptic PNG, json and picture: `street.png`, `street.json`, `street_drawn.png`.

    Raises:
        UserError: weights or a photo cannot be used, a result would overwrite another one or a photo, or `out` cannot
            be written.
    """
    for photo in photos:
        if not photo.is_file():
            raise DataError(f"{photo}: there is no such photo: check the path")
    taken = {photo.resolve() for photo in photos}
    for photo in photos:
        for ending in (".png", ".json", "_drawn.png"):
            path = (out / f"{photo.stem}{ending}").resolve()
            if path in taken:
                raise PlaceError(f"{path}: {photo} would overwrite it with its result: choose another --out or rename")
            taken.add(path)
    with logging_to(None):
        device = builders.choose_device(recipe)
        predictor = load_predictor(recipe, weights, device)
        _say_where(device)
        for photo in tqdm(photos, "predict", unit="photo"):
            result = predictor.predict(photo)
            result.save(out / photo.stem)
            write_png(out / f"{photo.stem}_drawn.png", result.draw())
    print(f"{len(photos)} results in {out}")


def evaluate(prediction_json: Path, truth_json: Path, out: Path | None = None) -> dict[str, Any]:
    """Scores COCO panoptic files, prints the table and, with `out`, writes the summary."""
    summary = evaluate_files(prediction_json, truth_json, out)
    print(summary_tables(summary, per_class=True))
    return summary


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
