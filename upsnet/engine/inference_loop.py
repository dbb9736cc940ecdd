"""The test loop: predictions, fresh from a network or read back from disk, are stored and scored one by one."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, takewhile
from typing import Any, Protocol

import torch
from torch import nn
from tqdm import tqdm

from upsnet.engine.precision import Precision, autocast
from upsnet.engine.together import Together
from upsnet.engine.workers import Workers
from upsnet.structures.errors import DataError
from upsnet.structures.results import Output, Prediction, Truth
from upsnet.structures.sample import Batch


class Evaluator(Protocol):
    """Holds predictions against the truth, one photo at a time."""

    def add(self, prediction: Prediction, truth: Truth) -> Any: ...

    def summary(self) -> Mapping[str, Any]: ...


class SharedEvaluator(Evaluator, Protocol):
    """One whose photos can be looked at by several workers: `add` is `count` of what `measure` gives, which is small
    and json can hold it."""

    def measure(self, prediction: Prediction, truth: Truth) -> Any: ...

    def count(self, measured: Any) -> None: ...


class Writer(Protocol):
    """Stores predictions, one photo at a time."""

    def add(self, prediction: Prediction) -> Any: ...


class ShareWriter(Protocol):
    """Stores predictions and what evaluators measured of them, one photo at a time."""

    def add(self, prediction: Prediction, measured: Mapping[str, Any]) -> Any: ...


def predict_batches(
    network: nn.Module,
    batches: Iterable[Batch],
    precision: Precision = "fp32",
    outputs: frozenset[Output] | None = None,
) -> Iterator[Prediction]:
    """The network's predictions, in the order of the batches. The network stays in evaluation mode.

    Args:
        outputs: what is wanted of a prediction; None: all that the network gives.
    """
    network.eval()
    wanted = () if outputs is None else (outputs,)
    device = next(network.parameters()).device
    for batch in batches:
        # Only around the pass: a generator that is left open must not leave its caller in inference mode.
        with torch.inference_mode(), autocast(device, precision):
            predictions = network(batch.to(device), *wanted)
        yield from predictions


def one_for_each(
    image_ids: Collection[int], predictions: Iterable[Prediction], task: str, show: bool = True
) -> Iterator[Prediction]:
    """Passes predictions on, in any order, with a bar of their progress.

    Args:
        image_ids: the images of the data set.
        task: what the bar is called.
        show: False: no bar.

    Raises:
        DataError: an image has no prediction or two, or a prediction is of no image of the data set. A score over
            other images than those asked for would be a wrong number.
    """
    wanted = set(image_ids)
    bar = tqdm(predictions, total=len(wanted), desc=task, unit="image", dynamic_ncols=True, disable=not show)
    for prediction in bar:
        if prediction.image_id not in wanted:
            known = prediction.image_id in image_ids
            problem = "has two predictions" if known else "is not in the data set"
            raise DataError(f"image {prediction.image_id} ({prediction.file_name}) {problem}: run the test again")
        wanted.remove(prediction.image_id)
        yield prediction
    if wanted:
        raise DataError(f"{len(wanted)} images have no prediction, the first is {min(wanted)}: run the test again")


def run_test(
    predictions: Iterable[Prediction],
    image_ids: Collection[int],
    truth_of: Callable[[int], Truth] | None = None,
    evaluators: Collection[Evaluator] = (),
    writer: Writer | None = None,
    show: bool = True,
) -> None:
    """Stores one prediction for each image, in any order, and holds it against the truth.

    Args:
        predictions: from `predict_batches`, or stored ones.
        image_ids: the images of the data set.
        truth_of: the truth of an image id; None where there is none (then there can be no evaluators).
        evaluators: their summaries can be asked for when the writer has closed its files.
        show: False: no bar.

    Raises:
        DataError: see `one_for_each`.
    """
    for prediction in one_for_each(image_ids, predictions, "test", show):
        if writer is not None:
            writer.add(prediction)
        if evaluators and truth_of is not None:
            truth = truth_of(prediction.image_id)
            for evaluator in evaluators:
                evaluator.add(prediction, truth)


def run_share(
    predictions: Iterable[Prediction],
    image_ids: Collection[int],
    writer: ShareWriter,
    truth_of: Callable[[int], Truth] | None = None,
    evaluators: Mapping[str, SharedEvaluator] | None = None,
    show: bool = True,
) -> None:
    """Stores the predictions of one worker's images, and what the evaluators measure of them; nothing is counted.

    Args and errors: as of `run_test`, with this worker's images.
    """
    for prediction in one_for_each(image_ids, predictions, "test", show):
        measured = {}
        if evaluators and truth_of is not None:
            truth = truth_of(prediction.image_id)
            measured = {name: evaluator.measure(prediction, truth) for name, evaluator in evaluators.items()}
        writer.add(prediction, measured)


def score_in_memory(
    network: nn.Module,
    batches: Iterable[Batch],
    image_ids: Sequence[int],
    truth_of: Callable[[int], Truth],
    evaluator: SharedEvaluator,
    workers: Workers,
    precision: Precision = "fp32",
    outputs: frozenset[Output] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Mapping[str, Any] | None:
    """The summary of a network that is being trained, on every worker; nothing is stored.

    The network comes back in the mode in which it came. Any number of workers gives the same to the last digit.

    Args:
        batches: this worker's; all workers' together have every image once.
        image_ids: of all workers' batches, in the order in which they are counted.
        evaluator: a fresh one that needs no files, for instance `PanopticQuality` (outputs: {"panoptic"}).
        stopped: asked before every batch; where it says so on a worker, nothing is given.

    Raises:
        DataError: an image has no prediction or two.
        UserError: a batch cannot be loaded on one of the workers; on all of them.
    """
    training, together = network.training, Together(workers)
    bar = tqdm(batches, desc="test", unit="batch", leave=False, dynamic_ncols=True, disable=workers.rank > 0)
    share = []
    with together.keeping():
        for prediction in predict_batches(network, takewhile(lambda _: not stopped(), bar), precision, outputs):
            share.append((prediction.image_id, evaluator.measure(prediction, truth_of(prediction.image_id))))
    network.train(training)
    shares, stops = zip(*together.exchange((share, stopped())), strict=True)
    if any(stops):
        return None
    gathered = list(chain.from_iterable(shares))
    measured = dict(gathered)
    if len(gathered) != len(image_ids) or measured.keys() != set(image_ids):
        raise DataError(f"{len(gathered)} predictions of {len(image_ids)} images: every image needs one")
    for image_id in image_ids:
        evaluator.count(measured[image_id])
    return evaluator.summary()
