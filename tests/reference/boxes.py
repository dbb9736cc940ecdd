"""Slow, obvious twins of the arithmetic on boxes and of the rules that match them: one box at a time."""

import math

import numpy as np
import torch

ONE, HALF = np.float32(1), np.float32(0.5)


def iou(a, b):
    """Of two inclusive float32 boxes, rounded where `box_iou` says that it rounds."""

    def area(box):
        return (float(box[2] - box[0]) + 1) * (float(box[3] - box[1]) + 1)

    width = float(min(a[2], b[2]) - max(a[0], b[0])) + 1
    height = float(min(a[3], b[3]) - max(a[1], b[1])) + 1
    if width <= 0 or height <= 0:
        return np.float32(0)
    overlap = np.float32(width) * np.float32(height)
    return overlap / np.float32(area(a) + float(np.float32(area(b))) - float(overlap))


def box_iou(boxes, others):
    rows = [[iou(a, b) for b in others.numpy()] for a in boxes.numpy()]
    return torch.from_numpy(np.array(rows, dtype=np.float32).reshape(len(boxes), len(others)))


def encode_one(box, target, weights=(1, 1, 1, 1)):
    """dx, dy, dw, dh in double precision."""
    (x1, y1, x2, y2), (tx1, ty1, tx2, ty2) = (list(map(float, b)) for b in (box, target))
    width, height, target_width, target_height = x2 - x1 + 1, y2 - y1 + 1, tx2 - tx1 + 1, ty2 - ty1 + 1
    return [
        weights[0] * ((tx1 + target_width / 2) - (x1 + width / 2)) / width,
        weights[1] * ((ty1 + target_height / 2) - (y1 + height / 2)) / height,
        weights[2] * math.log(target_width / width),
        weights[3] * math.log(target_height / height),
    ]


def decode_one(box, delta, weights=(1, 1, 1, 1)):
    x1, y1, x2, y2 = map(float, box)
    dx, dy, dw, dh = (float(d) / w for d, w in zip(delta, weights, strict=True))
    width, height = x2 - x1 + 1, y2 - y1 + 1
    center_x, center_y = x1 + width / 2 + dx * width, y1 + height / 2 + dy * height
    width, height = width * math.exp(min(dw, math.log(1000 / 16))), height * math.exp(min(dh, math.log(1000 / 16)))
    return [center_x - width / 2, center_y - height / 2, center_x + width / 2 - 1, center_y + height / 2 - 1]


def clip_one(box, size):
    height, width = size
    x1, y1, x2, y2 = box
    return [min(max(v, 0), top - 1) for v, top in ((x1, width), (y1, height), (x2, width), (y2, height))]


def coverage(box, region):
    """Share of a box inside a region."""
    width = float(min(box[2], region[2]) - max(box[0], region[0])) + 1
    height = float(min(box[3], region[3]) - max(box[1], region[1])) + 1
    if width <= 0 or height <= 0:
        return np.float32(0)
    area = (float(box[2] - box[0]) + 1) * (float(box[3] - box[1]) + 1)
    return np.float32(width) * np.float32(height) / np.float32(area)


def in_a_crowd(box, crowds, limit):
    return any(coverage(box, crowd) > np.float32(limit) for crowd in crowds.numpy())


def match_anchors(anchors, truth, crowds, size, options, draws):
    """The rules of facts 7.3 or, mended, ours, anchor by anchor: {anchor: 0 or 1} and {anchor: index of its box}."""
    height, width = size
    inside = []
    for i, (x1, y1, x2, y2) in enumerate(anchors.tolist()):
        s = options.straddle
        if s < 0 or (x1 >= -s and y1 >= -s and x2 < width + s and y2 < height + s):
            inside.append(i)
    overlaps = {i: [iou(anchors[i].numpy(), g) for g in truth.numpy()] for i in inside}
    best = {i: max(overlaps[i], default=np.float32(0)) for i in inside}
    labels = {}
    for i in inside:
        if len(truth) and best[i] >= options.positive_overlap:
            labels[i] = 1
    for g in range(len(truth)):
        most = max((overlaps[i][g] for i in inside), default=None)
        for i in inside:
            if overlaps[i][g] == most and (options.as_original or most > 0):
                labels[i] = 1
    nearest = {i: overlaps[i].index(best[i]) for i in inside if len(truth)}

    positives = list(labels)
    labels = dict.fromkeys(drawn(draws, positives, int(options.positive_fraction * options.batch_size)), 1)
    wanted = options.batch_size - len(labels)
    negatives = []
    for i in inside:
        taken = i in positives or in_a_crowd(anchors[i].numpy(), crowds, options.crowd_overlap)
        if best[i] < np.float32(options.negative_overlap) and (options.as_original or not taken):
            negatives.append(i)
    chosen = drawn(draws, negatives, wanted)
    if len(negatives) > wanted or not options.as_original:
        labels.update(dict.fromkeys(chosen, 0))
    return labels, nearest


def drawn(draws, candidates, size):
    """The first `size` of the candidates in random order; a choice depends on nothing but the row of candidates."""
    row = sorted(candidates)
    return [row[i] for i in draws.first(torch.ones(len(row), dtype=torch.bool), size).tolist()]


def sample_rois(proposals, truth, classes, is_crowd, options, draws):
    """The rules of facts 8.1 or, mended, ours: a list of (box, label, index of its truth or None)."""
    crowds = truth[is_crowd]
    boxes, foreground, background, owner = [], [], [], {}
    for g, box in enumerate(truth.numpy()):
        if is_crowd[g] and not options.as_original:
            continue
        owner[len(boxes)] = g
        if not is_crowd[g]:
            foreground.append(len(boxes))
        boxes.append(box)
    for box in proposals.numpy():
        i = len(boxes)
        boxes.append(box)
        overlap, owner[i] = np.float32(0), None
        for g in range(len(truth)):
            if options.as_original or not is_crowd[g]:
                here = iou(box, truth[g].numpy())
                if owner[i] is None or here > overlap:
                    overlap, owner[i] = here, g
        if not options.as_original and in_a_crowd(box, crowds, options.crowd_overlap):
            continue
        if overlap >= options.foreground_overlap:
            foreground.append(i)
        if options.background_low <= overlap < options.background_high:
            background.append(i)
    most = min(round(options.foreground_fraction * options.batch_size), len(foreground))
    chosen = drawn(draws, foreground, most)
    others = drawn(draws, background, options.batch_size - most)
    found = [(boxes[i], int(classes[owner[i]]), owner[i]) for i in chosen]
    return found + [(boxes[i], 0, None) for i in others]
