"""Slow, obvious twins of the panoptic head and of what follows it: whole tensors, one pixel at a time."""

import numpy as np
import torch
from torch.nn import functional as F

from upsnet.structures.sample import VOID


def segment_plane(scores, box):
    """The semantic logit inside a box, 0 elsewhere: from the truncated start to the rounded end, both included."""
    x1, y1, x2, y2 = box
    plane = torch.zeros_like(scores)
    for y in range(scores.shape[0]):
        for x in range(scores.shape[1]):
            if int(x1) <= x <= round(x2) and int(y1) <= y <= round(y2):
                plane[y, x] = scores[y, x]
    return plane


def mask_plane(logits, box, size):
    """Mask logits resized to the truncated box, 0 elsewhere."""
    x1, y1, x2, y2 = (int(v) for v in box)
    height, width = max(y2 - y1 + 1, 1), max(x2 - x1 + 1, 1)
    resized = F.interpolate(logits[None, None], size=(height, width), mode="bilinear", align_corners=False)[0, 0]
    plane = torch.zeros(size)
    for y in range(size[0]):
        for x in range(size[1]):
            if y1 <= y <= y2 and x1 <= x <= x2:
                plane[y, x] = resized[y - y1, x - x1]
    return plane


def panoptic_logits(scores, boxes, classes, mask_logits, num_stuff, unknown):
    quarter = [[v / 4 for v in box] for box in boxes.tolist()]
    segments = [segment_plane(scores[num_stuff - 1 + c], b) for b, c in zip(quarter, classes.tolist(), strict=True)]
    planes = list(scores[:num_stuff])
    for segment, box, logits in zip(segments, quarter, mask_logits, strict=True):
        planes.append(segment + mask_plane(logits, box, tuple(scores.shape[1:])))
    if unknown:
        explained = torch.stack(segments).amax(0) if segments else 0
        planes.append(scores[num_stuff:].amax(0) - explained)
    return torch.stack(planes) if planes else scores[:0]


def panoptic_target(semantic, masks, num_stuff, unknown):
    target = []
    for y in range(semantic.shape[0]):
        row = []
        for x in range(semantic.shape[1]):
            owners = [i for i in range(len(masks)) if masks[i, y, x]]
            label = int(semantic[y, x])
            if owners:
                row.append(num_stuff + owners[-1])
            elif label == VOID or label < num_stuff:
                row.append(label)
            else:
                row.append(num_stuff + len(masks) if unknown else VOID)
        target.append(row)
    return torch.tensor(target)


def panoptic_loss(logits, target):
    loss, correct, labelled = 0.0, 0, 0
    channels, height, width = logits.shape
    for y in range(height):
        for x in range(width):
            label = int(target[y, x])
            if label != VOID:
                labelled += 1
                loss -= logits[:, y, x].log_softmax(0)[label].item()
                correct += max(range(channels), key=logits[:, y, x].tolist().__getitem__) == label
    return loss / (height * width), correct / max(labelled, 1)


def remove_hidden(boxes, classes, mask_logits, size):
    """Positions of the kept instances."""
    kept, masks = [], []
    for i, (box, label) in enumerate(zip(boxes.tolist(), classes.tolist(), strict=True)):
        mask = mask_plane(mask_logits[i], box, size) > 0
        rivals = [m for k, m in zip(kept, masks, strict=True) if int(classes[k]) == label]
        covered = torch.stack(rivals).any(0) if rivals else torch.zeros(size, dtype=torch.bool)
        if mask.any() and int((mask & covered).sum()) / int(mask.sum()) <= 0.3:
            kept.append(i)
            masks.append(mask)
    return kept


def fuse(scores, boxes, classes, mask_logits, num_stuff, unknown, size):
    """Channels and semantic map from the whole (stuff + N + 1)×H×W tensor; also the kept positions and that tensor."""
    full = F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0] if len(scores) else scores
    kept = remove_hidden(boxes, classes, mask_logits, size)
    masks = [mask_plane(mask_logits[i], boxes[i].tolist(), size) for i in kept]
    if not kept and len(boxes):
        kept, masks = [0], [torch.zeros(size)]
    segments = [segment_plane(full[num_stuff - 1 + int(classes[i])], boxes[i].tolist()) for i in kept]
    planes = [*full[:num_stuff], *(s + m for s, m in zip(segments, masks, strict=True))]
    if unknown:
        explained = torch.stack(segments).amax(0) if segments else 0
        planes.append(full[num_stuff:].amax(0) - explained)
    planes = torch.stack(planes)
    channels = planes.argmax(0)
    if unknown:
        channels[channels == len(planes) - 1] = VOID
    return channels, full.argmax(0), kept, planes


def merge_segments(channels, semantic, classes, num_stuff, limit):
    """{pixel: (semantic id, instance or None)}; pixels without label are not in it."""
    labels = {}
    for position, channel in np.ndenumerate(channels):
        if 0 <= channel < num_stuff:
            labels[position] = (int(channel), None)
    for i, thing in enumerate(classes.tolist()):
        region = [position for position, channel in np.ndenumerate(channels) if channel == num_stuff + i]
        votes = {}
        for position in region:
            votes[int(semantic[position])] = votes.get(int(semantic[position]), 0) + 1
        label = (num_stuff - 1 + thing, i)
        if votes:
            majority = min(votes, key=lambda m: (-votes[m], m))
            if majority < num_stuff and 2 * votes[majority] >= len(region):
                label = (majority, None)
        labels.update(dict.fromkeys(region, label))
    for stuff in range(num_stuff):
        region = [position for position, label in labels.items() if label == (stuff, None)]
        if len(region) < limit:
            for position in region:
                del labels[position]
    return labels


def paste_mask(probabilities, box, size, threshold=0.5):
    """One mask on the photo, pixel by pixel; margin: how near a value comes to the threshold."""
    side = len(probabilities)
    frame = np.zeros((side + 2, side + 2))
    frame[1:-1, 1:-1] = probabilities
    x1, y1, x2, y2 = (float(v) for v in box)
    factor = (side + 2) / side
    half_width, half_height = (x2 - x1) / 2 * factor, (y2 - y1) / 2 * factor
    x1, x2 = int((x1 + x2) / 2 - half_width), int((x1 + x2) / 2 + half_width)
    y1, y2 = int((y1 + y2) / 2 - half_height), int((y1 + y2) / 2 + half_height)
    width, height = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)
    pasted, margin = np.zeros(size, dtype=bool), 1.0
    for y in range(max(y1, 0), min(y2 + 1, size[0])):
        for x in range(max(x1, 0), min(x2 + 1, size[1])):
            v = max((y - y1 + 0.5) * (side + 2) / height - 0.5, 0)
            u = max((x - x1 + 0.5) * (side + 2) / width - 0.5, 0)
            top, left = int(v), int(u)
            bottom, right = min(top + 1, side + 1), min(left + 1, side + 1)
            dv, du = v - top, u - left
            value = (frame[top, left] * (1 - du) + frame[top, right] * du) * (1 - dv)
            value += (frame[bottom, left] * (1 - du) + frame[bottom, right] * du) * dv
            pasted[y, x] = value > threshold
            margin = min(margin, abs(value - threshold))
    return pasted, margin
