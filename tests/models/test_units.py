"""The single pieces of the network give the numbers of the original (`oracle_fixtures/units_*.npz`)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.fixtures import CONFIGURATIONS, NumpyAnchorDraws, NumpyDraws, load_units, piece
from upsnet.models.anchors import base_anchors, grid_anchors
from upsnet.models.box_head import Candidates, DetectionOptions, box_losses, decode_above, suppress
from upsnet.models.boxes import box_iou, clip, decode, encode
from upsnet.models.mask_head import mask_loss
from upsnet.models.matching import AnchorSampling, RoISampling, SampledRoIs, mask_targets, match_anchors, sample_rois
from upsnet.models.panoptic_head import fuse, panoptic_logits, panoptic_loss, panoptic_target
from upsnet.models.postprocess import merge_segments
from upsnet.models.rpn import ProposalOptions, RPNOutput, propose, rpn_losses
from upsnet.operators import nms, paste_masks, pyramid_roi_align
from upsnet.operators.panoptic_head import remove_hidden
from upsnet.structures.masks import Masks, mask_from_coco
from upsnet.structures.sample import VOID

STRIDES = (4, 8, 16, 32, 64)
close = torch.testing.assert_close


def near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """1e-5 relative to the greatest value: the fixtures' tolerance of floats that are not boxes."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(theirs.abs().flatten().tolist(), default=0.0))


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def units(request: pytest.FixtureRequest, shared: Callable[[str], Path]) -> dict[str, Any]:
    return load_units(shared, request.param)


def numbers(units: dict[str, Any]) -> tuple[int, int]:
    """C and S of the configuration."""
    meta = json.loads(str(units["meta_json"]))
    return meta["C"], meta["S"]


def test_anchors(units: dict[str, Any]) -> None:
    _, out = piece(units, "anchors")
    for stride in STRIDES:
        close(base_anchors(stride).double(), out[f"stride{stride}"].double(), rtol=0, atol=0)


def test_box_decode(units: dict[str, Any]) -> None:
    given, out = piece(units, "box_decode")
    weights = given["weights"].tolist()
    for column in range(0, given["deltas"].shape[1], 4):
        boxes = decode(given["boxes"], given["deltas"][:, column : column + 4], weights)
        close(boxes, out["boxes"][:, column : column + 4], rtol=0, atol=1e-3)


def test_box_encode(units: dict[str, Any]) -> None:
    given, out = piece(units, "box_encode")
    near(encode(given["boxes"], given["gt"], given["weights"].tolist()), out["targets"])


def test_box_clip(units: dict[str, Any]) -> None:
    given, out = piece(units, "box_clip")
    height, width = given["im_shape"].tolist()
    boxes = given["boxes"].view(len(given["boxes"]), -1, 4)
    close(clip(boxes, (height, width)), out["boxes"].view_as(boxes), rtol=0, atol=1e-3)


def test_overlaps_are_equal_to_the_bit(units: dict[str, Any]) -> None:
    given, out = piece(units, "overlaps")
    close(box_iou(given["boxes"], given["query"]), out["iou"], rtol=0, atol=0)


def test_nms(units: dict[str, Any]) -> None:
    given, out = piece(units, "nms")
    kept = nms(given["dets"][:, :4], given["dets"][:, 4], float(given["thresh"]), inclusive=True)
    assert kept.tolist() == out["keep"].tolist()


def rpn_output(logits: list[torch.Tensor], deltas: list[torch.Tensor]) -> RPNOutput:
    anchors = [
        grid_anchors(base_anchors(stride), *level.shape[-2:], stride)
        for stride, level in zip(STRIDES, logits, strict=True)
    ]
    return RPNOutput(logits, deltas, anchors)


def test_proposals(units: dict[str, Any]) -> None:
    given, out = piece(units, "proposals")
    levels = range(2, 7)
    output = rpn_output([given[f"prob_p{i}"].logit() for i in levels], [given[f"delta_p{i}"] for i in levels])
    height, width, scale = given["im_info"][0].tolist()
    options = ProposalOptions(float(given["thresh"]), int(given["pre_nms"]), int(given["post_nms"]))
    found = propose(output, [(int(height), int(width))], [scale], options)
    near(found.scores[found.valid], out["scores"])
    close(found.trimmed()[0], out["rois"][:, 1:], rtol=0, atol=1e-3)


def anchor_labels(units: dict[str, Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Ours for the whole field of anchors, level by level: labels (h, w, A) and targets (h, w, A, 4)."""
    given, _ = piece(units, "rpn_targets")
    sides = [-(-int(given["field_max_size"]) // stride) for stride in STRIDES]
    anchors = [
        grid_anchors(base_anchors(stride), side, side, stride) for stride, side in zip(STRIDES, sides, strict=True)
    ]
    labels, targets = match_anchors(
        torch.cat(anchors),
        given["gt"],
        torch.zeros(0, 4),
        (int(given["im_h"]), int(given["im_w"])),
        AnchorSampling(as_original=True),
        NumpyAnchorDraws(int(given["numpy_seed"])),
    )
    counts = [len(level) for level in anchors]
    return (
        [part.view(side, side, 3) for part, side in zip(labels.split(counts), sides, strict=True)],
        [part.view(side, side, 3, 4) for part, side in zip(targets.split(counts), sides, strict=True)],
    )


def test_rpn_targets(units: dict[str, Any]) -> None:
    _, out = piece(units, "rpn_targets")
    labels, targets = anchor_labels(units)
    for stride, level_labels, level_targets in zip(STRIDES, labels, targets, strict=True):
        expected = out[f"rpn_labels_int32_s{stride}"][0].permute(1, 2, 0)
        assert torch.equal(level_labels, expected.long())
        positive = level_labels == 1
        side = len(level_labels)
        wanted = out[f"rpn_bbox_targets_s{stride}"][0].view(3, 4, side, side).permute(2, 3, 0, 1)
        near(level_targets[positive], wanted[positive])


def test_rpn_loss(units: dict[str, Any]) -> None:
    given, out = piece(units, "rpn_loss")
    deltas, _ = piece(units, "proposals")
    targets, _ = piece(units, "rpn_targets")
    levels = range(2, 7)
    output = rpn_output([given[f"logit_p{i}"] for i in levels], [deltas[f"delta_p{i}"] for i in levels])
    class_loss, box_loss = rpn_losses(
        output,
        [targets["gt"]],
        [torch.zeros(0, 4)],
        [(int(targets["im_h"]), int(targets["im_w"]))],
        AnchorSampling(as_original=True),
        [NumpyAnchorDraws(int(targets["numpy_seed"]))],
    )
    close(class_loss, out["cls"], rtol=1e-5, atol=0)
    close(box_loss, out["bbox"], rtol=1e-5, atol=0)


def test_fpn_roialign(units: dict[str, Any]) -> None:
    given, out = piece(units, "fpn_roialign")
    pooled = pyramid_roi_align([given[f"p{i}"] for i in range(2, 6)], given["rois"], int(given["size"]))
    near(pooled, out["pooled"])


def detections(units: dict[str, Any], name: str, threshold: float, class_agnostic: bool) -> Candidates:
    given, _ = piece(units, name)
    height, width, _ = given["im_info"][0].tolist()
    options = DetectionOptions(score_threshold=threshold)
    found = decode_above(
        given["rois"][:, 1:],
        given["cls_prob"],
        given["bbox_pred"].view(len(given["rois"]), -1, 4),
        (int(height), int(width)),
        threshold,
        options.box_weights,
    )
    return found.select(suppress(found, options, class_agnostic))


@pytest.mark.parametrize(("name", "threshold"), [("detect_per_class", 0.05), ("detect_panoptic", 0.6)])
def test_detections(units: dict[str, Any], name: str, threshold: float) -> None:
    _, out = piece(units, name)
    found = detections(units, name, threshold, class_agnostic=name == "detect_panoptic")
    assert found.classes.tolist() == out["cls"].tolist()
    close(found.scores, out["scores"], rtol=1e-5, atol=0)
    close(found.boxes, out["boxes"][:, 1:], rtol=0, atol=1e-3)


def test_without_detections_there_is_no_dummy(units: dict[str, Any]) -> None:
    # The original stands a class-0 box in for "nothing" and drops it later; ours is empty from the start.
    _, out = piece(units, "detect_none")
    assert out["cls"].tolist() == [0] and out["boxes"].abs().sum() == 0 and out["scores"].tolist() == [1.0]
    assert len(detections(units, "detect_none", 0.6, class_agnostic=True)) == 0


def test_panoptic_test(units: dict[str, Any]) -> None:
    given, out = piece(units, "panoptic_test")
    half = given["sem_half"][0]
    size = (half.shape[-2] * 2, half.shape[-1] * 2)
    masks = given["mask_logits"][:, 0]
    kept, patches = remove_hidden(given["boxes"][:, 1:], given["cls"], masks, size)
    assert kept == out["keep"].tolist()
    sums = torch.stack([patch.double().sum() for patch, _ in patches])
    near(sums, out["mask_energy_sum"][0].double())
    for (patch, place), expected in zip(patches, out["mask_energy_first"], strict=False):
        plane = torch.zeros(size)
        plane[place] = patch
        near(plane, expected)


def test_panoptic_fusion(units: dict[str, Any]) -> None:
    given, out = piece(units, "panoptic_test")
    classes, seg_classes = numbers(units)
    candidates = Candidates(given["boxes"][:, 1:], given["score"], given["cls"])
    full = F.interpolate(given["sem_half"], scale_factor=2, mode="bilinear", align_corners=False)[0]
    size = (full.shape[-2], full.shape[-1])
    fused = fuse(given["sem_half"][0], size, candidates, given["mask_logits"][:, 0], seg_classes - classes + 1)
    channels = torch.where(fused.channels == VOID, 255, fused.channels).long()
    assert torch.equal(channels, out["ids"][0].long())
    assert torch.equal(fused.semantic.long(), full.argmax(dim=0))


def test_panoptic_train(units: dict[str, Any]) -> None:
    given, out = piece(units, "panoptic_train")
    classes, seg_classes = numbers(units)
    num_stuff = seg_classes - classes + 1
    boxes, scores, masks = given["boxes"][:, 1:], given["fcn_score"][0], given["mask_logits"][:, 0]
    every = panoptic_logits(scores, boxes, given["cls"], masks, num_stuff, unknown=True)
    near(every[num_stuff:-1], (out["seg_inst"] + out["mask_term"])[0])
    kept = given["keep_inds"]
    semantic = torch.where(given["seg_gt_4x"][0] == 255, VOID, given["seg_gt_4x"][0])
    planes = (given["mask_gt"] != 0) & (given["mask_gt"] != 255)
    target = panoptic_target(semantic, planes[kept], num_stuff, unknown=True)
    assert torch.equal(torch.where(target == VOID, 255, target), out["target"][0])
    logits = panoptic_logits(scores, boxes[kept], given["cls"][kept], masks[kept], num_stuff, unknown=True)
    close(panoptic_loss(logits, target)[0], out["loss"], rtol=1e-5, atol=0)


def sampled_rois(units: dict[str, Any]) -> tuple[SampledRoIs, dict[str, Any], dict[str, Any]]:
    given, out = piece(units, "sample_rois")
    sampled = sample_rois(
        given["proposals"][:, 1:] / float(given["scale"]),
        given["gt_boxes"],
        given["gt_classes"].long(),
        given["is_crowd"],
        RoISampling(as_original=True),
        NumpyDraws(int(given["numpy_seed"])),
    )
    return sampled.trimmed(), given, out


def test_sample_rois(units: dict[str, Any]) -> None:
    sampled, given, out = sampled_rois(units)
    assert torch.equal(sampled.labels, out["labels_int32"].long())
    close(sampled.boxes * float(given["scale"]), out["rois"][:, 1:], rtol=0, atol=1e-3)
    foreground = torch.arange(len(sampled.box_targets))
    targets = out["bbox_targets"].view(len(sampled.labels), -1, 4)
    near(sampled.box_targets, targets[foreground, sampled.labels[foreground]])


def test_mask_targets(units: dict[str, Any]) -> None:
    sampled, given, out = sampled_rois(units)
    classes, _ = numbers(units)
    segmentations = json.loads(given["segms_json"])
    masks = Masks(
        [mask_from_coco(s, 1000, 1000) for s, crowd in zip(segmentations, given["is_crowd"], strict=True) if not crowd]
    )
    count = len(sampled.box_targets)
    targets = mask_targets(sampled.boxes[:count], masks, 28)
    expected = out["mask_int32"].view(count, classes, 28, 28)[torch.arange(count), sampled.labels[:count]]
    assert torch.equal(targets, expected.float())


def test_rcnn_loss(units: dict[str, Any]) -> None:
    given, out = piece(units, "rcnn_loss")
    sampled, _, sample_out = sampled_rois(units)
    classes, _ = numbers(units)
    class_loss, box_loss, accuracy = box_losses(
        given["cls_score"], given["bbox_pred"].view(len(sampled.labels), -1, 4), [sampled]
    )
    close(class_loss, out["cls"], rtol=1e-5, atol=0)
    close(box_loss, out["bbox"], rtol=1e-5, atol=0)
    near(accuracy, out["acc"])
    count = len(sampled.box_targets)
    scores = np.random.RandomState(99).randn(count, classes, 28, 28).astype(np.float32)
    own = torch.from_numpy(scores)[torch.arange(count), sampled.labels[:count]]
    targets = sample_out["mask_int32"].view(count, classes, 28, 28)[torch.arange(count), sampled.labels[:count]]
    close(mask_loss(own, targets.float(), [count]), out["mask"], rtol=1e-5, atol=0)


def test_mask_paste(units: dict[str, Any]) -> None:
    given, out = piece(units, "mask_paste")
    height, width = given["shape"].tolist()
    by_class = given["cls"].argsort(stable=True)  # the order in which the original lists its results
    rles = paste_masks(given["mask_prob"][by_class, 0], given["boxes"][by_class].numpy(), (height, width))
    for ours, theirs in zip(rles, json.loads(out["rle_json"]), strict=True):
        assert ours == theirs


def test_unified(units: dict[str, Any]) -> None:
    given, out = piece(units, "unified")
    classes, seg_classes = numbers(units)
    num_stuff = seg_classes - classes + 1
    channels = given["pan"].numpy().astype(np.int16)
    channels[channels == 255] = VOID
    things = given["cls_inds"].numpy()
    segment_map, segments = merge_segments(
        channels,
        given["seg"].numpy().astype(np.int16),
        things,
        np.ones(len(things), dtype=np.float32),
        num_stuff,
        int(given["limit"]),
    )
    ours = np.zeros((*segment_map.shape, 2), dtype=np.int64)
    ours[segment_map == 0] = (255, 0)
    for segment in segments:
        number = 0 if segment.semantic_id < num_stuff else segment.id - num_stuff
        ours[segment_map == segment.id] = (segment.semantic_id, number)
    theirs = out["pan_2ch"].numpy().astype(np.int64)
    # The original counts all instances that occur in the map, ours those of the network's list: compare the partition.
    assert np.array_equal(ours[..., 0], theirs[..., 0])
    pairs = np.unique(np.stack([ours[..., 1].ravel(), theirs[..., 1].ravel()], axis=1), axis=0)
    assert len(pairs) == len(np.unique(pairs[:, 0])) == len(np.unique(pairs[:, 1]))
