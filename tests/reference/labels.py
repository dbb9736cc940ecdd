"""Slow, obvious twins of mask and label operations: one pixel at a time."""

import cv2
import numpy as np


def segment_summary(segment_map):
    """{id: (area, (x, y, width, height))} by visiting every pixel."""
    found = {}
    for y, row in enumerate(segment_map.tolist()):
        for x, segment_id in enumerate(row):
            found.setdefault(segment_id, []).append((x, y))
    summary = {}
    for segment_id, pixels in found.items():
        xs, ys = [x for x, _ in pixels], [y for _, y in pixels]
        box = (min(xs), min(ys), max(xs) - min(xs) + 1, max(ys) - min(ys) + 1)
        summary[segment_id] = (len(pixels), box)
    return summary


def crop_bitmap(mask, box, size):
    """A bitmap on the photo, seen through a box: the pixel under the centre of each bin."""
    height, width = mask.shape
    x1, y1, x2, y2 = (float(v) for v in box)
    seen = np.zeros((size, size), dtype=bool)
    for i in range(size):
        for j in range(size):
            y = int(np.floor(y1 + (i + 0.5) / size * max(y2 - y1, 1.0)))
            x = int(np.floor(x1 + (j + 0.5) / size * max(x2 - x1, 1.0)))
            if 0 <= y < height and 0 <= x < width:
                seen[i, j] = mask[y, x]
    return seen


def polygon_area_by_points(polygon, size, steps=4):
    """Share of each pixel of a size×size grid inside a polygon: the even-odd rule at steps×steps points."""
    corners = np.asarray(polygon, dtype=float).reshape(-1, 2)
    share = np.zeros((size, size))
    for i in range(size * steps):
        for j in range(size * steps):
            x, y = (j + 0.5) / steps, (i + 0.5) / steps
            inside = False
            for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
                if (ay > y) != (by > y) and x < (bx - ax) * (y - ay) / (by - ay) + ax:
                    inside = not inside
            share[i // steps, j // steps] += inside
    return share / steps**2


def quarter_masks(masks, size, scale, canvas_size):
    """Draw, resize by scale, resize by a quarter: each step on whole maps."""
    planes = []
    for mask in masks:
        drawn = mask.draw(*canvas_size).astype(np.uint8)
        resized = cv2.resize(drawn, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
        assert resized.shape == size
        if min(round(size[0] / 4), round(size[1] / 4)) == 0:
            planes.append(np.zeros((round(size[0] / 4), round(size[1] / 4))))
            continue
        planes.append(cv2.resize(resized, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_NEAREST))
    return np.stack(planes).astype(bool)
