"""Slow, obvious twin of the fusion of views: one photo, one view, box, pixel at a time, in double precision."""

import math

import numpy as np
import torch

from tests.reference.boxes import clip_one, decode_one
from tests.reference.nms import nms
from tests.reference.panoptic import fuse
from upsnet.dataset.batches import collate
from upsnet.models.box_head import Candidates
from upsnet.models.postprocess import detections_on_photo, labels_on_photo, merge_segments
from upsnet.models.rpn import propose
from upsnet.structures.results import Prediction


def box_in_photo(box, view):
    """A box of a view in photo pixels."""
    x1, y1, x2, y2 = (float(v) / view.scale for v in box)
    last = view.original_size[1] - 1
    return [last - x2, y1, last - x1, y2] if view.flipped else [x1, y1, x2, y2]


def box_in_view(box, view):
    """A box in photo pixels in a view."""
    x1, y1, x2, y2 = box
    if view.flipped:
        last = view.original_size[1] - 1
        x1, x2 = last - x2, last - x1
    return clip_one([v * view.scale for v in (x1, y1, x2, y2)], view.size)


def carried_scores(scores, view, reference, shape):
    """S×h×w scores of a view at stride 4 at the reference's pixels."""
    scores = scores.double().numpy()
    height, width = scores.shape[1:]
    pixels = np.empty((len(scores), *shape))
    for row in range(shape[0]):
        for column in range(shape[1]):
            y, x = (row + 0.5) / reference.scale, (column + 0.5) / reference.scale  # in the photo, from its edge
            if view.flipped != reference.flipped:
                x = view.original_size[1] - x
            v = min(max(y * view.scale / 4 - 0.5, 0), height - 1)
            u = min(max(x * view.scale / 4 - 0.5, 0), width - 1)
            top, left = math.floor(v), math.floor(u)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = scores[:, top, left] * (1 - (u - left)) + scores[:, top, right] * (u - left)
            lower = scores[:, bottom, left] * (1 - (u - left)) + scores[:, bottom, right] * (u - left)
            pixels[:, row, column] = upper * (1 - (v - top)) + lower * (v - top)
    return torch.from_numpy(pixels)


def mean_scores(views):
    """Logits of the mean of the softmax of S×H×W scores, at the mean of their levels."""
    views = [view.double() for view in views]
    probabilities = sum(view.softmax(dim=0) for view in views) / len(views)
    level = sum(view.logsumexp(dim=0) for view in views) / len(views)
    return probabilities.log() + level


def mean_masks(views):
    """Logits of the mean of the sigmoid of mask logits."""
    inside = sum(1 / (1 + (-view.double()).exp()) for view in views) / len(views)
    outside = sum(1 / (1 + view.double().exp()) for view in views) / len(views)
    return (inside / outside).log()


def select(found, options, threshold, class_agnostic):
    """found: (score, class, box) of all views. The survivors of suppression, as `Candidates`."""
    found = [each for each in found if each[0] > threshold]
    boxes = np.array([box for _, _, box in found], dtype=np.float32).reshape(-1, 4)
    groups = None if class_agnostic else np.array([label for _, label, _ in found])
    scores = np.array([score for score, _, _ in found])
    kept = [found[i] for i in nms(boxes, scores, options.nms_threshold, groups, extra=1)]
    if len(kept) > options.max_detections:
        kept = [each for each in kept if each[0] >= kept[options.max_detections - 1][0]]
    if not class_agnostic:
        kept.sort(key=lambda each: each[1])
    return Candidates(
        torch.tensor([box for _, _, box in kept]).reshape(-1, 4),
        torch.tensor([score for score, _, _ in kept]),
        torch.tensor([label for _, label, _ in kept], dtype=torch.int64),
    )


def found_in(network, features, view):
    """(score, class, box in the photo) of every pair of proposal and class in a view."""
    options = network.selection
    (proposals,) = propose(features.rpn, [view.size], [view.scale], options.proposals).trimmed()
    found = []
    for roi in proposals:
        logits, deltas = network.box_head(features.levels, torch.tensor([[0.0, *roi.tolist()]]))
        for label, score in enumerate(logits[0].softmax(dim=0).tolist()):
            if label > 0:
                box = decode_one(roi, deltas[0, label], options.detections.box_weights)
                found.append((score, label, box_in_photo(clip_one(box, view.size), view)))
    return found


def masks_of(network, levels, views, found):
    """N×M×M mask logits of boxes of the reference, from all views."""
    side = 2 * network.mask_head.pooled_size
    masks = torch.zeros(len(found), side, side)
    for i, (box, label) in enumerate(zip(found.boxes.tolist(), found.classes.tolist(), strict=True)):
        logits = []
        for view, of_view in zip(views, levels, strict=True):
            roi = torch.tensor([[0.0, *box_in_view(box_in_photo(box, views[0]), view)]])
            mask = network.mask_head(of_view, roi, torch.tensor([label]))[0]
            logits.append(mask.flip(1) if view.flipped else mask)
        masks[i] = mean_masks(logits)
    return masks


def predict(network, views):
    """The prediction for one photo. views: its samples, the reference first."""
    reference, options = views[0], network.selection
    features = [network.features(collate([view]).images) for view in views]
    levels = [each.levels for each in features]
    size = tuple(collate([reference]).images.shape[2:])
    scores = mean_scores(
        [carried_scores(each.scores[0], view, reference, size) for each, view in zip(features, views, strict=True)]
    )
    found = [
        (score, label, box_in_view(box, reference))
        for each, view in zip(features, views, strict=True)
        for score, label, box in found_in(network, each, view)
    ]
    detections = select(found, options.detections, options.detections.score_threshold, class_agnostic=False)
    candidates = select(found, options.detections, options.panoptic_score_threshold, class_agnostic=True)
    masks = [masks_of(network, levels, views, each) for each in (detections, candidates)]
    channels, semantic, kept, _ = fuse(
        scores.float(), candidates.boxes, candidates.classes, masks[1], network.num_stuff, network.has_unknown, size
    )
    height, width = reference.size
    channels, semantic = (
        labels_on_photo(labels[:height, :width], reference.scale, reference.original_size)
        for labels in (channels, semantic)
    )
    segment_map, segments = merge_segments(
        channels,
        semantic,
        candidates.classes[kept].numpy(),
        candidates.scores[kept].numpy(),
        network.num_stuff,
        options.stuff_area_limit,
    )
    instances = detections_on_photo(detections, masks[0], reference.scale, reference.original_size)
    return Prediction(reference.image_id, reference.file_name, segment_map, segments, instances, semantic)
