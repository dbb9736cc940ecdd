"""The panoptic head against twins that build every tensor in full."""

import pytest
import torch

from tests.operators.test_panoptic_head import BOXES, HEIGHT, THINGS, WIDTH, instances_of, scores_of
from tests.reference import panoptic as twin
from tests.syncs import count_syncs
from upsnet.models.box_head import Candidates
from upsnet.models.panoptic_head import (
    fuse,
    keep_instances,
    panoptic_logits,
    panoptic_loss,
    panoptic_target,
)
from upsnet.operators import library
from upsnet.structures.draws import SeededDraws
from upsnet.structures.sample import VOID

close = torch.testing.assert_close


@pytest.mark.parametrize("unknown", [True, False])
@pytest.mark.parametrize("num_stuff", [0, 2])
@pytest.mark.parametrize("name", BOXES)
def test_panoptic_logits(name, num_stuff, unknown):
    scores, (boxes, classes, masks) = scores_of(num_stuff), instances_of(name)
    logits = panoptic_logits(scores, boxes, classes, masks, num_stuff, unknown)
    assert logits.shape == (num_stuff + len(boxes) + unknown, HEIGHT, WIDTH)
    close(logits, twin.panoptic_logits(scores, boxes, classes, masks, num_stuff, unknown), rtol=0, atol=1e-6)


def test_gradients_of_the_logits():
    scores, (boxes, classes, masks) = scores_of(2).double().requires_grad_(), instances_of("many")
    masks = masks[:3].double().requires_grad_()
    given = (boxes[:3], classes[:3])
    assert torch.autograd.gradcheck(lambda s, m: panoptic_logits(s, *given, m, 2, True), (scores, masks))


@pytest.mark.parametrize("unknown", [True, False])
@pytest.mark.parametrize("num_stuff", [0, 2])
@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("void", ["some", "everywhere"])
def test_panoptic_target_and_loss(void, count, num_stuff, unknown):
    generator = torch.Generator().manual_seed(2)
    semantic = torch.randint(VOID, num_stuff + THINGS, (HEIGHT, WIDTH), generator=generator).to(torch.int16)
    if void == "everywhere":
        semantic.fill_(VOID)
    masks = torch.rand(count, HEIGHT, WIDTH, generator=generator) > 0.7
    target = panoptic_target(semantic, masks, num_stuff, unknown)
    assert torch.equal(target, twin.panoptic_target(semantic, masks, num_stuff, unknown))

    logits = torch.randn(num_stuff + count + unknown, HEIGHT, WIDTH, generator=generator).requires_grad_()
    loss, accuracy = panoptic_loss(logits, target)
    expected, expected_accuracy = twin.panoptic_loss(logits.detach(), target)
    close(loss.item(), expected, rtol=1e-5, atol=1e-6)
    close(accuracy.item(), expected_accuracy, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert logits.grad.isfinite().all()


def test_the_share_of_instances_that_are_kept():
    draws = SeededDraws(1)
    assert [len(keep_instances(n, 0.7, draws)) for n in (0, 1, 2, 3, 10, 11)] == [0, 1, 1, 2, 7, 7]
    assert sorted(keep_instances(5, 1.0, draws).tolist()) == [0, 1, 2, 3, 4]
    orders = {tuple(keep_instances(6, 0.7, SeededDraws(seed)).tolist()) for seed in range(20)}
    assert len(orders) > 10 and all(len(set(order)) == 4 for order in orders)


def test_fuse():
    """The operator's kept flags choose the instances; what it does to pixels is tested where it lives."""
    scores, (boxes, classes, masks) = scores_of(2), instances_of("many")
    candidates, size = Candidates(boxes, torch.linspace(0.99, 0.6, len(boxes)), classes), (4 * HEIGHT, 4 * WIDTH)
    fused = fuse(scores, size, candidates, masks, 2)
    channels, semantic, kept, _ = twin.fuse(scores, boxes, classes, masks, 2, True, size)
    assert torch.equal(fused.channels.long(), channels) and torch.equal(fused.semantic.long(), semantic)
    assert torch.equal(fused.instances.boxes, boxes[kept]) and torch.equal(fused.instances.classes, classes[kept])
    assert torch.equal(fused.instances.scores, candidates.scores[kept])
    # it would be void if instances and the unknown channel never won a pixel
    assert len(channels.unique()) > 6 and (channels == VOID).any() and 1 < len(kept) < len(boxes)
    assert (fuse(scores, size, candidates, masks, 2, unknown=False).channels != VOID).all()


@pytest.mark.skipif(not library.native_in_use(), reason=library.NOT_IN_USE_BECAUSE)
def test_the_host_waits_once_whatever_the_number_of_instances():
    for name in ("none", "one", "many"):
        boxes, classes, masks = instances_of(name)
        candidates = Candidates(boxes, torch.linspace(0.99, 0.6, len(boxes)), classes)
        with count_syncs() as syncs:
            fuse(scores_of(2), (4 * HEIGHT, 4 * WIDTH), candidates, masks, 2)
        assert dict(syncs.counts) == {"nonzero": 1}, syncs
