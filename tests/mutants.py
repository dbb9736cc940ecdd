"""Fifteen one-line changes that a careless hand could make. `test_mutants.py` shows that each breaks a test."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`before` stands once in `path` and becomes `after`; at least one of `tests` must notice."""

    name: str
    path: str
    before: str
    after: str
    tests: tuple[str, ...]


MUTANTS = (
    Mutant(
        "a match at an IoU of exactly one half",
        "upsnet/evaluation/panoptic_quality.py",
        "if iou > 0.5:",
        "if iou >= 0.5:",
        ("tests/evaluation/test_panoptic_quality.py",),
    ),
    Mutant(
        "the + 1 of a box dropped",
        "upsnet/models/boxes.py",
        "boxes[..., 2] - boxes[..., 0] + 1,",
        "boxes[..., 2] - boxes[..., 0],",
        ("tests/models/test_boxes.py",),
    ),
    Mutant(
        "rounding for truncation in the mask paste",
        "upsnet/operators/paste_masks.py",
        "grown = _grow(boxes, (side + 2) / side).astype(np.int32)",
        "grown = np.rint(_grow(boxes, (side + 2) / side)).astype(np.int32)",
        ("tests/operators/test_paste_masks.py",),
    ),
    Mutant(
        "panoptic loss as a mean over labelled pixels",
        "upsnet/models/panoptic_head.py",
        'reduction="sum") / target.numel()',
        'reduction="sum") / (target != VOID).sum()',
        ("tests/models/test_panoptic_head.py",),
    ),
    Mutant(
        "the stride on the 3×3",
        "upsnet/models/resnet.py",
        "first, second = (stride, 1) if stride_in_1x1 else (1, stride)",
        "first, second = (1, stride)",
        ("tests/models/test_resnet.py",),
    ),
    Mutant(
        "RPN loss divided by the anchors sampled",
        "upsnet/models/rpn.py",
        "class_losses.append(class_loss / options.batch_size)",
        "class_losses.append(class_loss / sampled.sum().clamp(min=1))",
        ("tests/models/test_rpn.py",),
    ),
    Mutant(
        "the level rule's small term outside the logarithm",
        "upsnet/operators/pyramid_roi_align.py",
        "torch.log2(side / CANONICAL_SIZE + 1e-6))",
        "torch.log2(side / CANONICAL_SIZE) + 1e-6)",
        ("tests/operators/test_pyramid_roi_align.py",),
    ),
    Mutant(
        "mask logits in the unknown channel",
        "upsnet/models/panoptic_head.py",
        "explained = segments.amax(dim=0)",
        "explained = channels[-1].amax(dim=0)",
        ("tests/models/test_panoptic_head.py",),
    ),
    Mutant(
        "the semantic patch's end truncated",
        "upsnet/operators/panoptic_head.py",
        "return _slices(int(y1), round(y2) + 1, size[0]), _slices(int(x1), round(x2) + 1, size[1])",
        "return _slices(int(y1), int(y2) + 1, size[0]), _slices(int(x1), int(x2) + 1, size[1])",
        ("tests/operators/test_panoptic_head.py",),
    ),
    Mutant(
        "biases at the rate of weights",
        "upsnet/engine/optimizer.py",
        "parameter_groups(network, weight_decay, bias_factor=2.0), momentum)",
        "parameter_groups(network, weight_decay, bias_factor=1.0), momentum)",
        ("tests/engine/test_optimizer.py",),
    ),
    Mutant(
        "a mirrored box off by one",
        "upsnet/dataset/coco_panoptic.py",
        "torch.stack([width - x2 - 1, y1, width - x1 - 1, y2], dim=1)",
        "torch.stack([width - x2, y1, width - x1, y2], dim=1)",
        ("tests/dataset/test_coco_panoptic.py",),
    ),
    Mutant(
        "photos resized by the ratio of the rounded sizes",
        "upsnet/dataset/transforms.py",
        "cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)",
        "cv2.resize(image, scaled_size(*image.shape[:2], scale)[::-1], interpolation=cv2.INTER_LINEAR)",
        ("tests/dataset/test_transforms.py",),
    ),
    Mutant(
        "stuff of exactly the least area removed",
        "upsnet/models/postprocess.py",
        "areas >= max(stuff_area_limit, 1)",
        "areas > max(stuff_area_limit, 1)",
        ("tests/models/test_postprocess.py",),
    ),
    Mutant(
        "void pixels counted in the union",
        "upsnet/evaluation/panoptic_quality.py",
        "self.prediction_area[prediction_id] - shared - in_void",
        "self.prediction_area[prediction_id] - shared",
        ("tests/evaluation/test_panoptic_quality.py",),
    ),
    Mutant(
        "a bus of Cityscapes from a truck of COCO",
        "upsnet/checkpoints/class_rows.py",
        '"bus": "bus",',
        '"bus": "truck",',
        ("tests/checkpoints/test_class_rows.py",),
    ),
)
