"""The test loop: predictions, fresh from a network or read back from disk, are stored and scored one by one."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from tqdm import tqdm

from upsnet.engine.precision import Precision, autocast
from upsnet.structures.errors import DataError
from upsnet.structures.results import Output, Prediction, Truth
from upsnet.structures.sample import Batch


class Evaluator(Protocol):
    """Holds predictions against the truth, one photo at a time."""

    def add(self, prediction: Prediction, truth: Truth) -> Any: ...

    def summary(self) -> Mapping[str, Any]: ...


class Writer(Protocol):
    """Stores predictions, one photo at a time."""

    def add(self, prediction: Prediction) -> Any: ...


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


def one_for_each(image_ids: Collection[int], predictions: Iterable[Prediction], task: str) -> Iterator[Prediction]:
    """Passes predictions on, in any order, with a bar of their progress.

    Args:
        image_ids: the images of the data set.
        task: what the bar is called.

    Raises:
        DataError: an image has no prediction or two, or a prediction is of no image of the data set. A score over
            other images than those asked for would be a wrong number.
    """
    wanted = set(image_ids)
    for prediction in tqdm(predictions, total=len(wanted), desc=task, unit="image", dynamic_ncols=True):
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
) -> None:
    """Stores one prediction for each image, in any order, and holds it against the truth.

    Args:
        predictions: from `predict_batches`, or stored ones.
        image_ids: the images of the data set.
        truth_of: the truth of an image id; None where there is none (then there can be no evaluators).
        evaluators: their summaries can be asked for when the writer has closed its files.

    Raises:
        DataError: see `one_for_each`.
    """
    for prediction in one_for_each(image_ids, predictions, "test"):
        if writer is not None:
            writer.add(prediction)
        if evaluators and truth_of is not None:
            truth = truth_of(prediction.image_id)
            for evaluator in evaluators:
                evaluator.add(prediction, truth)
