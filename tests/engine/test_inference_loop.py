from dataclasses import dataclass, field
from functools import partial

import pytest
import torch

from tests.engine.thread_workers import together
from tests.engine.toy import Toy, batch_of, truth_of
from upsnet.engine.inference_loop import predict_batches, run_test, score_in_memory
from upsnet.structures.errors import DataError
from upsnet.structures.results import Prediction


@dataclass
class Pairs:
    """An evaluator, and a writer, that remembers what it was given."""

    pairs: list = field(default_factory=list)

    def add(self, prediction, truth=None):
        self.pairs.append((prediction.image_id, truth.image_id if truth else None))


def test_network_predictions_are_written_and_scored():
    network, first, second, writer = Toy(), Pairs(), Pairs(), Pairs()
    network.train()
    predictions = predict_batches(network, [batch_of([5, 2]), batch_of([9])])
    run_test(predictions, [2, 5, 9], truth_of, [first, second], writer)
    assert first.pairs == second.pairs == [(5, 5), (2, 2), (9, 9)]
    assert [image_id for image_id, _ in writer.pairs] == [5, 2, 9]
    assert not network.training


def test_stored_predictions_take_the_same_road():
    stored = list(predict_batches(Toy(), [batch_of([1, 2])]))
    evaluator = Pairs()
    run_test(iter(stored), [1, 2], truth_of, [evaluator])
    assert evaluator.pairs == [(1, 1), (2, 2)]


def test_without_truth_results_are_only_written():
    writer = Pairs()
    run_test(predict_batches(Toy(), [batch_of([1])]), [1], writer=writer)
    assert writer.pairs == [(1, None)]


@pytest.mark.parametrize(
    ("ids", "message"),
    [([1], "1 images have no prediction, the first is 2"), ([1, 2, 1], "image 1 .*two"), ([1, 3], "image 3 .*not in")],
)
def test_other_images_than_asked_for_give_no_number(ids, message):
    predictions = [Prediction(i, f"{i}.jpg") for i in ids]
    with pytest.raises(DataError, match=message):
        run_test(predictions, [1, 2], truth_of, [Pairs()])


def test_passes_run_without_gradients_and_in_the_precision_asked_for():
    modes = []

    class Looks(Toy):
        def forward(self, batch):
            modes.append((torch.is_inference_mode_enabled(), self.conv(batch.images).dtype))
            return super().forward(batch)

    for precision in ("fp32", "bf16"):
        for _ in predict_batches(Looks(), [batch_of([1])], precision):
            assert not torch.is_inference_mode_enabled()
    assert modes == [(True, torch.float32), (True, torch.bfloat16)]


@dataclass
class Sizes:
    """An evaluator whose sum depends on the order of its terms."""

    total: float = 0.0

    def measure(self, prediction, truth):
        return float(prediction.segment_map.mean()) * 10.0**prediction.image_id

    def count(self, measured):
        self.total = self.total / 3 + measured

    def summary(self):
        return {"total": self.total}


@pytest.mark.parametrize("training", [False, True])
def test_several_workers_score_in_memory_what_one_does(training):
    images = [5, 2, 9, 4, 7]

    def score(workers, ids=images):
        network = Toy().train(training)
        own = [batch_of([i]) for i in images[workers.rank :: workers.count]]
        summary = score_in_memory(network, own, ids, truth_of, Sizes(), workers)
        assert network.training == training
        return summary

    (alone,) = together(1, score)
    assert together(2, score) == [alone] * 2 and together(6, score) == [alone] * 6
    with pytest.raises(DataError, match="5 predictions of 4 images"):
        together(1, partial(score, ids=images[:4]))
