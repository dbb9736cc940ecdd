"""A training step makes the host wait for the device twice: for the RoIs whose masks it draws, and for the log."""

from dataclasses import replace

import pytest
import torch

from tests.models.small import SAMPLES, small_network, training_batch
from tests.syncs import count_syncs
from upsnet.engine.optimizer import build_optimizer
from upsnet.engine.options import LoopOptions
from upsnet.engine.train import train
from upsnet.models.matching import IGNORED, AnchorSampling, RoISampling, SampledRoIs
from upsnet.models.rpn import ProposalOptions
from upsnet.models.upsnet import SamplingOptions

BATCHES = {
    "one photo": ["things and stuff"],
    "nothing": ["nothing at all"],
    "every kind": list(SAMPLES),
    "things often": ["things and stuff"] * 5,
}
ORIGINAL = pytest.mark.parametrize("as_original", [True, False], ids=["original", "mended"])


def network_of(as_original=False):
    # Few proposals and many slots, so that some stay empty.
    sampling = SamplingOptions(
        AnchorSampling(64, as_original=as_original),
        ProposalOptions(pre_nms=30, post_nms=150),
        RoISampling(140, as_original=as_original),
        with_roi_loss=True,
    )
    return small_network(sampling=sampling)


def step(network, kinds, accumulation=1):
    """One step of the engine."""
    batches = [replace(training_batch(*kinds), draws=()) for _ in range(accumulation)]
    options = LoopOptions(max_iteration=1, steps_per_epoch=1, lr=0.01, seed=3, accumulation=accumulation)
    train(network, batches, build_optimizer(network, "sgd"), options)


@pytest.fixture
def untrimmed(monkeypatch):
    """As on a device: empty slots of RoIs stay."""
    seen = []

    def keep(sampled):
        seen.append(sampled)
        return sampled

    monkeypatch.setattr(SampledRoIs, "trimmed", keep)
    return seen


@ORIGINAL
@pytest.mark.parametrize("kinds", BATCHES.values(), ids=BATCHES)
def test_a_step_waits_twice(kinds, as_original, untrimmed):
    network = network_of(as_original)
    with count_syncs() as syncs:
        step(network, kinds)
    assert {(name, place.split(":")[0]): count for (name, place), count in syncs.places.items()} == {
        ("to", "structures/transfer.py"): 1,
        ("tolist", "engine/train.py"): 1,
    }
    assert any((sampled.labels == IGNORED).any() for sampled in untrimmed)


def test_accumulation_waits_once_a_batch_and_once_for_the_log(untrimmed):
    network = network_of()
    with count_syncs() as syncs:
        step(network, ["things and stuff", "bitmaps"], accumulation=3)
    assert syncs.counts == {"to": 3, "tolist": 1}


@ORIGINAL
@pytest.mark.parametrize("kinds", BATCHES.values(), ids=BATCHES)
def test_empty_slots_change_nothing(kinds, as_original, request):
    """What a CPU trims and a device carries along gives the same losses and gradients."""
    found = []
    for _ in range(2):
        network = network_of(as_original)
        output = network(training_batch(*kinds))
        torch.stack(list(output.losses.values())).sum().backward()
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        found.append({**output.losses, **output.metrics, **gradients})
        request.getfixturevalue("untrimmed")  # for the second time
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
