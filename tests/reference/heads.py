"""Slow, obvious twins of the heads: whole maps, whole score layers, one box at a time."""

import cv2
import numpy as np
import torch
from torch.nn import functional as F
from torchvision.ops import roi_align

from tests.reference.boxes import clip_one, decode_one
from tests.reference.nms import nms
from upsnet.operators import pyramid_roi_align
from upsnet.structures.sample import VOID


def concatenated_features(head, levels):
    """The semantic head's features of all levels, enlarged to P2: B×4·width×h×w."""
    size = levels[0].shape[-2:]
    return torch.cat(
        [F.interpolate(head.layers(p), size=size, mode="bilinear", align_corners=False) for p in levels], dim=1
    )


def semantic_loss(scores, target):
    """Pixel by pixel: mean over labelled pixels, then over images."""
    enlarged = F.interpolate(scores, scale_factor=4, mode="bilinear", align_corners=False).log_softmax(1).numpy()
    total = 0.0
    for image, labels in enumerate(target.tolist()):
        pixels = [
            -float(enlarged[image, label, y, x])
            for y, row in enumerate(labels)
            for x, label in enumerate(row)
            if label != VOID
        ]
        total += sum(pixels) / max(len(pixels), 1)
    return total / len(target)


def crop_labels(target, box, side=28):
    """A label map cut by a rounded box (end exclusive), resized by OpenCV."""
    x1, y1, x2, y2 = (round(float(v)) for v in box)
    x2, y2 = (x2 + 1 if x1 == x2 else x2), (y2 + 1 if y1 == y2 else y2)
    crop = target.numpy()[y1:y2, x1:x2]
    return torch.from_numpy(cv2.resize(crop, (side, side), interpolation=cv2.INTER_NEAREST)).long()


def roi_loss(head, levels, target, boxes):
    """The concatenated features are pooled, then scored; unlabelled elements count in the mean."""
    features, total = concatenated_features(head, levels), 0.0
    for image, image_boxes in enumerate(boxes):
        losses = []
        for box in image_boxes:
            roi = torch.tensor([[float(image), *box.tolist()]])
            pooled = roi_align(features, roi, 28, spatial_scale=0.25, sampling_ratio=2)
            labels = crop_labels(target[image], box)[None]
            losses += F.cross_entropy(head.score(pooled), labels, ignore_index=VOID, reduction="none").flatten()
        total += sum(losses) / max(len(losses), 1)
    return total / len(boxes)


def mask_logits(head, levels, rois, classes):
    """All channels of the score layer, of which one is taken."""
    pooled = pyramid_roi_align(levels, rois, head.pooled_size)
    every = head.score(F.relu(head.deconv(head.convs(pooled))))
    return torch.stack([every[i, c] for i, c in enumerate(classes.tolist())]) if len(rois) else every[:, 0]


def propose(output, image, size, scale, options):
    """Proposals level by level, anchor by anchor: a list of (score, box), best first."""
    found = []
    for logits, deltas, anchors in zip(output.logits, output.deltas, output.anchors, strict=True):
        count, height, width = logits.shape[1:]
        raw = []
        for y in range(height):
            for x in range(width):
                for a in range(count):
                    delta = deltas[image, 4 * a : 4 * a + 4, y, x].tolist()
                    anchor = anchors[(y * width + x) * count + a].tolist()
                    raw.append((float(logits[image, a, y, x].sigmoid()), clip_one(decode_one(anchor, delta), size)))
        raw = sorted(raw, key=lambda pair: -pair[0])[: options.pre_nms]
        least = options.min_size * scale
        raw = [(s, b) for s, b in raw if min(b[2] - b[0], b[3] - b[1]) + 1 >= least]
        boxes = np.array([b for _, b in raw], dtype=np.float32).reshape(-1, 4)
        kept = nms(boxes, np.array([s for s, _ in raw]), options.nms_threshold, extra=1)
        found += [raw[i] for i in kept[: options.post_nms]]
    return sorted(found, key=lambda pair: -pair[0])[: options.post_nms]


def detect(rois, probabilities, deltas, size, options, class_agnostic):
    """A list of (score, class, box)."""
    found = []
    for roi, scores, offsets in zip(rois.tolist(), probabilities.tolist(), deltas.tolist(), strict=True):
        for label in range(1, len(scores)):
            if scores[label] > options.score_threshold:
                box = clip_one(decode_one(roi, offsets[label], options.box_weights), size)
                found.append((scores[label], label, box))
    boxes = np.array([box for _, _, box in found], dtype=np.float32).reshape(-1, 4)
    groups = None if class_agnostic else np.array([label for _, label, _ in found])
    kept = [found[i] for i in nms(boxes, np.array([s for s, _, _ in found]), options.nms_threshold, groups, extra=1)]
    if len(kept) > options.max_detections:
        least = kept[options.max_detections - 1][0]
        kept = [found for found in kept if found[0] >= least]
    return kept if class_agnostic else sorted(kept, key=lambda found: found[1])
