"""The panoptic head against twins that build every tensor in full."""

import pytest
import torch

from tests.reference import panoptic as twin
from upsnet.models.box_head import Candidates
from upsnet.models.panoptic_head import (
    fuse,
    keep_instances,
    panoptic_logits,
    panoptic_loss,
    panoptic_target,
    remove_hidden,
    segment_patch,
)
from upsnet.structures.draws import SeededDraws
from upsnet.structures.sample import VOID

close = torch.testing.assert_close
HEIGHT, WIDTH = 12, 16  # of the scores; the network's input has four times as much
THINGS = 3

BOXES = {
    "none": [],
    "one": [[6.0, 5, 40, 30]],
    "one pixel": [[9.0, 9, 9, 9]],
    "last pixel": [[63.0, 47, 63, 47], [62.6, 46.6, 63, 47]],
    "whole image": [[0.0, 0, 63, 47], [0, 0, 63, 47], [0, 0, 63, 47]],
    "halves": [[2.5, 3.5, 20.5, 21.5], [3.5, 2.5, 30.49, 11.51]],  # round half to even
    "over the border": [[-9.0, -5, 20, 20], [50, 40, 90, 70], [-30, -30, -10, -10], [100, 100, 120, 110]],
    "inside out": [[20.0, 20, 10, 10], [63.0, 5, 62.99, 20], [5, 30.01, 9, 29.99]],  # clipping makes such boxes
    "many": [[4.0 * i, 3.0 * i, 4.0 * i + 22, 3.0 * i + 25] for i in range(9)],
}


def instances_of(name, seed=0):
    boxes = torch.tensor(BOXES[name]).reshape(-1, 4)
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(1, THINGS + 1, (len(boxes),), generator=generator)
    return boxes, classes, torch.randn(len(boxes), 7, 7, generator=generator) * 3


def scores_of(num_stuff, seed=1):
    return torch.randn(num_stuff + THINGS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed)) * 2


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


def test_patches():
    assert segment_patch([2.9, 3.9, 4.5, 5.5], (20, 20)) == (slice(3, 7), slice(2, 5))  # half to even
    assert segment_patch([-5.0, -5, 100, 100], (20, 30)) == (slice(0, 20), slice(0, 30))


def candidates_of(name, seed=0):
    boxes, classes, masks = instances_of(name, seed)
    return Candidates(boxes, torch.linspace(0.99, 0.6, len(boxes)), classes), masks


@pytest.mark.parametrize("unknown", [True, False])
@pytest.mark.parametrize("num_stuff", [0, 20])
@pytest.mark.parametrize("name", BOXES)
@pytest.mark.parametrize("masks", ["random", "all full", "all empty", "half empty"])
def test_fuse(masks, name, num_stuff, unknown):
    scores, (candidates, logits) = scores_of(num_stuff), candidates_of(name)
    if masks == "all full":
        logits = logits.abs() + 0.1  # covers its whole box: those behind others go
    elif masks == "all empty":
        logits = -logits.abs()
    elif masks == "half empty":
        logits[::2] = -logits[::2].abs()
    fused = fuse(scores, (4 * HEIGHT, 4 * WIDTH), candidates, logits, num_stuff, unknown)
    if num_stuff == len(candidates) == unknown == 0:
        assert fused.channels.shape == (4 * HEIGHT, 4 * WIDTH) and len(fused.instances) == 0
        return
    channels, semantic, kept = twin.fuse(scores, candidates.boxes, candidates.classes, logits, num_stuff, unknown)
    assert torch.equal(fused.channels, channels)
    assert torch.equal(fused.semantic, semantic)
    assert torch.equal(fused.instances.boxes, candidates.boxes[kept])
    assert torch.equal(fused.instances.scores, candidates.scores[kept])
    if masks == "all empty":
        assert kept == [0][: len(candidates)]


def test_the_cases_of_fusion_occur():
    """The comparison above would be void if instances and the unknown channel never won a pixel."""
    scores, (candidates, logits) = scores_of(2), candidates_of("many")
    fused = fuse(scores, (4 * HEIGHT, 4 * WIDTH), candidates, logits, 2)
    assert len(fused.channels.unique()) > 6 and (fused.channels == VOID).any()
    assert 1 < len(fused.instances) < len(candidates)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", BOXES)
def test_remove_hidden(name, seed):
    candidates, masks = candidates_of(name, seed)
    size = (4 * HEIGHT, 4 * WIDTH)
    kept, patches = remove_hidden(candidates, masks, size)
    assert kept == twin.remove_hidden(candidates.boxes, candidates.classes, masks, size)
    for i, (patch, place) in zip(kept, patches, strict=True):
        plane = torch.zeros(size)
        plane[place] = patch
        close(plane, twin.mask_plane(masks[i], candidates.boxes[i].tolist(), size))


def test_only_masks_of_the_same_class_hide():
    boxes, full = torch.tensor([[4.0, 4, 23, 23]] * 3), torch.ones(3, 7, 7)
    candidates = Candidates(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1, 2, 1]))
    assert remove_hidden(candidates, full, (48, 64))[0] == [0, 1]
    # exactly 30 % covered is not too much
    boxes = torch.tensor([[0.0, 0, 9, 9], [7, 0, 16, 9], [6, 20, 15, 29], [0, 20, 9, 29]])
    candidates = Candidates(boxes, torch.linspace(0.9, 0.6, 4), torch.ones(4, dtype=torch.int64))
    assert remove_hidden(candidates, torch.ones(4, 7, 7), (48, 64))[0] == [0, 1, 2]
