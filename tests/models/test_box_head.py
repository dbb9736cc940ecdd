import pytest
import torch
from torch.nn import functional as F

from tests.models.test_boxes import random_boxes
from tests.models.test_semantic_head import levels_of
from tests.reference import heads as twin
from tests.reference.roi_align import pyramid_roi_align
from tests.syncs import count_syncs
from upsnet.models.box_head import (
    BoxHead,
    Candidates,
    DetectionOptions,
    box_losses,
    decode_above,
    joined_positions,
    suppress,
)
from upsnet.models.matching import SampledRoIs
from upsnet.operators import library

close = torch.testing.assert_close
SIZE = (80, 110)


def raw_detections(count, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rois = random_boxes(count, seed, 90.0).clamp(min=0)
    probabilities = (torch.randn(count, classes, generator=generator) * 2).softmax(dim=1)
    deltas = torch.randn(count, classes, 4, generator=generator) * 2
    return rois, probabilities, deltas


OPTIONS = {
    "default": DetectionOptions(),
    "all": DetectionOptions(score_threshold=0.0, nms_threshold=1.0, max_detections=1000),
    "few": DetectionOptions(max_detections=5),
    "strict": DetectionOptions(score_threshold=0.6, nms_threshold=0.1),
    "nothing": DetectionOptions(score_threshold=1.0),
}


def detect(rois, probabilities, deltas, size, options, class_agnostic):
    lower = max(options.score_threshold - 0.3, 0)  # what another use of the same boxes may ask for
    found = decode_above(rois, probabilities, deltas, size, lower, options.box_weights)
    return found.select(suppress(found, options, class_agnostic))


@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("count", [0, 1, 40])
def test_detect(count, options, class_agnostic):
    rois, probabilities, deltas = raw_detections(count)
    found = detect(rois, probabilities, deltas, SIZE, options, class_agnostic)
    expected = twin.detect(rois, probabilities, deltas, SIZE, options, class_agnostic)
    assert found.classes.tolist() == [label for _, label, _ in expected] and len(found) == len(expected)
    close(found.scores, torch.tensor([score for score, _, _ in expected]))
    boxes = torch.tensor([box for _, _, box in expected]).reshape(-1, 4)
    close(found.boxes, boxes, rtol=1e-4, atol=1e-3)
    assert (len(found) > 0) == (count > 0 and options is not OPTIONS["nothing"]) or count == 1


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_ties_with_the_last_detection_stay(class_agnostic):
    boxes = torch.tensor([[20.0 * i, 0, 20 * i + 9, 9] for i in range(5)])
    probabilities = torch.tensor([0.9, 0.7, 0.7, 0.7, 0.5])
    probabilities = torch.stack([1 - probabilities, probabilities], dim=1)
    options = DetectionOptions(max_detections=2)
    found = detect(boxes, probabilities, torch.zeros(5, 2, 4), (10, 200), options, class_agnostic)
    assert found.boxes.tolist() == boxes[:4].tolist()


@pytest.mark.skipif(not library.native_in_use(), reason=library.NOT_IN_USE_BECAUSE)
@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("count", [0, 1, 40, 400])
def test_the_device_is_waited_for_once(count, class_agnostic):
    raw = raw_detections(count)
    with count_syncs() as syncs:
        found = decode_above(*raw, SIZE, 0.05, (10.0, 10.0, 5.0, 5.0))
    assert dict(syncs.counts) == {"nonzero": 1}, syncs
    with count_syncs() as syncs:
        suppress(found, DetectionOptions(max_detections=20), class_agnostic)
    assert dict(syncs.counts) == {"nonzero": 1}, syncs


@pytest.mark.parametrize("lists", [([3, 1], [5, 1, 0]), ([], [2]), ([], []), ([4], [4], [4, 2])])
def test_joined_positions(lists):
    joined, places = joined_positions(6, [torch.tensor(given, dtype=torch.int64) for given in lists])
    assert joined.tolist() == sorted({position for given in lists for position in given})
    assert [joined[place].tolist() for place in places] == list(lists)


def test_candidates_can_be_selected_by_nothing():
    given = Candidates(torch.zeros(3, 4), torch.zeros(3), torch.ones(3, dtype=torch.int64))
    assert len(given.select(torch.zeros(0, dtype=torch.int64))) == 0


@pytest.mark.parametrize("norm", ["none", "group_norm", "batch_norm"])
def test_the_head_sees_each_roi_in_its_own_image(norm):
    torch.manual_seed(0)
    head = BoxHead(32, 4, width=64, norm=norm).eval()
    for layer in (head.class_logits, head.deltas):
        torch.nn.init.normal_(layer.weight, std=0.3)
    levels = levels_of()
    rois = torch.tensor([[0.0, 3, 3, 60, 50], [1, 3, 3, 60, 50], [0, 5, 5, 5, 5]])
    logits, deltas = head(levels, rois)
    assert logits.shape == (3, 4) and deltas.shape == (3, 4, 4) and (logits[0] - logits[1]).abs().max() > 0.01
    alone, _ = head([level[1:] for level in levels], torch.tensor([[0.0, 3, 3, 60, 50]]))
    close(alone, logits[1:2], rtol=1e-4, atol=1e-5)
    # deltas: class by class, four numbers each
    pooled = pyramid_roi_align(levels, rois, 7).flatten(1)
    if norm == "none":
        hidden = F.relu(head.fc7(F.relu(head.fc6(pooled))))
        close(deltas.flatten(1), head.deltas(hidden), rtol=1e-5, atol=1e-5)
    logits, deltas = head(levels, torch.zeros(0, 5))
    assert logits.shape == (0, 4) and deltas.shape == (0, 4, 4)


def sampled(labels, foreground, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return SampledRoIs(
        torch.zeros(len(labels), 4), torch.tensor(labels).long(), torch.randn(foreground, 4, generator=generator)
    )


CASES = {
    "mixed": [sampled([1, 3, 0, 0, 0], 2)],
    "background only": [sampled([0, 0], 0)],
    "foreground only": [sampled([2, 1], 2)],
    "no roi": [sampled([], 0)],
    "two images": [sampled([1, 3, 0, 0, 0], 2), sampled([2, 0, 0], 1, seed=1)],
    "with an empty one": [sampled([1, 0], 1), sampled([], 0), sampled([0], 0)],
}


@pytest.mark.parametrize("images", CASES.values(), ids=CASES)
def test_box_losses(images):
    count = sum(len(image.labels) for image in images)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(count, 4, generator=generator, requires_grad=True)
    deltas = torch.randn(count, 4, 4, generator=generator, requires_grad=True)
    class_loss, box_loss, accuracy = box_losses(logits, deltas, images)
    expected, start = [0.0, 0.0, 0.0], 0
    for image in images:
        rois = len(image.labels)
        for i, label in enumerate(image.labels.tolist()):
            scores = logits[start + i].tolist()
            expected[0] -= logits[start + i].log_softmax(0)[label].item() / rois / len(images)
            expected[2] += (max(range(4), key=scores.__getitem__) == label) / rois / len(images)
            if i < len(image.box_targets):
                for ours, theirs in zip(deltas[start + i, label].tolist(), image.box_targets[i].tolist(), strict=True):
                    distance = abs(ours - theirs)
                    loss = 0.5 * distance**2 if distance < 1 else distance - 0.5
                    expected[1] += loss / rois / len(images)
        start += rois
    close(torch.stack([class_loss, box_loss, accuracy]), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    (class_loss + box_loss).backward()
    assert logits.grad.isfinite().all() and deltas.grad.isfinite().all()
