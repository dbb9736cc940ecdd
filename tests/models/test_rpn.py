import pytest
import torch
from torch.nn import functional as F

from tests.reference import heads as twin
from tests.syncs import count_syncs
from upsnet.models.matching import AnchorSampling, match_anchors
from upsnet.models.rpn import RPN, ProposalOptions, RPNOutput, propose, rpn_losses
from upsnet.operators import library
from upsnet.structures.draws import SeededDraws

close = torch.testing.assert_close


def rpn_of(seed=0, **options):
    torch.manual_seed(seed)
    rpn = RPN(16, **options)
    for layer in (rpn.objectness, rpn.deltas):
        torch.nn.init.normal_(layer.weight, std=0.5)
    torch.nn.init.normal_(rpn.conv.weight, std=0.1)
    return rpn


def levels_of(height=64, width=96, images=2):
    generator = torch.Generator().manual_seed(1)
    shapes = [(images, 16, -(-height // 2**i), -(-width // 2**i)) for i in range(2, 7)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


OPTIONS = {
    "default": ProposalOptions(),
    "few": ProposalOptions(pre_nms=30, post_nms=20),
    "no small ones": ProposalOptions(pre_nms=60, min_size=9.0),
    "nothing": ProposalOptions(pre_nms=60, min_size=1000.0),
    "no suppression": ProposalOptions(nms_threshold=1.0, pre_nms=40, post_nms=100),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_propose(options):
    with torch.no_grad():
        output = rpn_of()(levels_of())
    sizes, scales = [(60, 90), (50, 96)], [1.5, 1.1]
    found = propose(output, sizes, scales, options)
    assert found.valid.shape == found.scores.shape == found.boxes.shape[:2]
    assert not found.boxes[~found.valid].any() and not found.scores[~found.valid].any()
    for image, boxes in enumerate(found.trimmed()):
        expected = twin.propose(output, image, sizes[image], scales[image], options)
        assert found.valid[image].tolist() == [i < len(expected) for i in range(found.valid.shape[1])]
        close(found.scores[image, : len(boxes)], torch.tensor([score for score, _ in expected]))
        close(boxes, torch.tensor([box for _, box in expected]).reshape(-1, 4), rtol=1e-4, atol=1e-3)
        assert (len(boxes) == 0) == (options.min_size == 1000.0)
        alone = propose(alone_of(output, image), [sizes[image]], [scales[image]], options)
        assert torch.equal(alone.boxes[0], found.boxes[image]) and torch.equal(alone.scores[0], found.scores[image])


def alone_of(output, image):
    """One image of an output, in the other memory format."""
    logits, deltas = (
        [level[image : image + 1].contiguous(memory_format=torch.channels_last) for level in levels]
        for levels in (output.logits, output.deltas)
    )
    return RPNOutput(logits, deltas, output.anchors)


@pytest.mark.skipif(not library.native_in_use(), reason=library.NOT_IN_USE_BECAUSE)
@torch.no_grad()
def test_proposals_ask_nothing_of_the_device():
    output = rpn_of()(levels_of())
    for options in OPTIONS.values():
        with count_syncs() as syncs:
            found = propose(output, [(60, 90)] * 2, [1.5] * 2, options)
        assert not syncs, syncs
        with count_syncs() as syncs:
            found.trimmed()
        assert len(syncs) == 1, syncs


def test_shapes_and_other_anchors():
    rpn = rpn_of(ratios=(0.5, 2.0), scales=(4.0, 8.0))
    output = rpn(levels_of())
    assert [tuple(level.shape) for level in output.logits][:2] == [(2, 4, 16, 24), (2, 4, 8, 12)]
    assert [len(a) for a in output.anchors] == [level[0].numel() for level in output.logits]
    logits, deltas = output.of_image(1)
    assert logits[0][4 * (3 * 24 + 5) + 2] == output.logits[0][1, 2, 3, 5]
    assert torch.equal(deltas[0][4 * (3 * 24 + 5) + 2], output.deltas[0][1, 8:12, 3, 5])
    assert not [name for name in rpn.state_dict() if "anchor" in name]


@pytest.mark.parametrize("batch_size", [64, 4096], ids=["all places taken", "places left over"])
def test_losses(batch_size):
    output = rpn_of()(levels_of())
    truth = [torch.tensor([[3.0, 4, 40, 50], [60, 10, 61, 11]]), torch.zeros(0, 4)]
    crowds = [torch.tensor([[50.0, 10, 95, 60]]), torch.zeros(0, 4)]
    sizes, options = [(64, 96), (50, 70)], AnchorSampling(batch_size=batch_size)
    class_loss, box_loss = rpn_losses(output, truth, crowds, sizes, options, [SeededDraws(1), SeededDraws(2)])
    expected = [0.0, 0.0]
    for image, draws in enumerate((SeededDraws(1), SeededDraws(2))):
        anchors = torch.cat(output.anchors)
        labels, targets = match_anchors(anchors, truth[image], crowds[image], sizes[image], options, draws)
        logits, deltas = (torch.cat(parts) for parts in output.of_image(image))
        sampled = [i for i, label in enumerate(labels.tolist()) if label >= 0]
        for i in sampled:
            expected[0] += F.softplus(-logits[i] if labels[i] == 1 else logits[i]).item() / batch_size / 2
            if labels[i] == 1:
                for d in (deltas[i] - targets[i]).abs().tolist():
                    expected[1] += (4.5 * d * d if d < 1 / 9 else d - 1 / 18) / len(sampled) / 2
    close(torch.stack([class_loss, box_loss]), torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert class_loss > 0 and box_loss > 0


def test_without_any_anchor_inside():
    output = rpn_of()(levels_of())
    boxes = [torch.tensor([[0.0, 0, 5, 5]])] * 2
    class_loss, box_loss = rpn_losses(output, boxes, boxes, [(6, 6)] * 2, AnchorSampling(), [SeededDraws(1)] * 2)
    (class_loss + box_loss).backward()
    assert class_loss == 0 and box_loss == 0


def test_an_empty_level_is_no_trouble():
    output = RPNOutput([torch.zeros(1, 3, 0, 0)], [torch.zeros(1, 12, 0, 0)], [torch.zeros(0, 4)])
    found = propose(output, [(10, 10)], [1.0], ProposalOptions())
    assert found.boxes.shape == (1, 0, 4) and found.scores.shape == found.valid.shape == (1, 0)
    assert [boxes.shape for boxes in found.trimmed()] == [(0, 4)]


def test_scores_that_round_to_the_same_number_are_ranked_by_their_logits():
    logits = 20 + torch.randperm(24, generator=torch.Generator().manual_seed(0)).float().reshape(1, 3, 2, 4) / 10
    anchors = torch.tensor([[20.0 * i, 0, 20 * i + 9, 9] for i in range(24)])
    output = RPNOutput([logits], [torch.zeros(1, 12, 2, 4)], [anchors])
    found = propose(output, [(10, 500)], [1.0], ProposalOptions(pre_nms=10))
    assert (found.scores == 1).all()
    assert torch.equal(found.boxes[0], anchors[output.of_image(0)[0][0].argsort(descending=True)[:10]])
