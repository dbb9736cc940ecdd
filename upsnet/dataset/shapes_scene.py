"""One image of the `shapes` data set: stuff from the sky down, things on top of each other, a strip without label."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from upsnet.dataset.shapes_drawing import (
    SILHOUETTES,
    TEXTURES,
    Float,
    contrasting_lab,
    lab_to_rgb,
    light,
    random_lab,
    second_tone,
    silhouette,
    smooth_noise,
    wavy_line,
)

NO_THINGS = 0.06
"""Share of images without things."""
CROWD = 0.12
"""Share of the others that have a crowd group."""
VOID_STRIP = 0.15
"""Share of images with a strip without label along one side."""
DIAMETERS = (20.0, 68.0)
"""Diameter of the disk with a thing's area, in pixels of an image whose short side is 192."""
_MOST_THINGS_AREA = 0.27
"""Share of an image that the things may fill, before they cover each other."""
_COVER = (0.08, 0.42)
"""Share of a thing that the one placed over it on purpose may hide."""


@dataclass(slots=True)
class Piece:
    """One segment to be.

    kind: a silhouette or a texture. diameter: of the disk with a thing's area before anything covers it, pixels;
    0 for stuff and crowds.
    """

    kind: str
    is_crowd: bool = False
    diameter: float = 0.0


@dataclass(slots=True)
class Scene:
    """image: H×W×3 uint8 RGB. labels: H×W int16, position in `pieces`, -1 without label."""

    image: NDArray[np.uint8]
    labels: NDArray[np.int16]
    pieces: list[Piece]


@dataclass(slots=True)
class _Sheet:
    """A scene in the making.

    canvas: H×W×3 RGB, 0..1. tones: the colours of each piece. border: widths of the strip without label at the top,
    bottom, left and right.
    """

    canvas: Float
    labels: NDArray[np.int16]
    pieces: list[Piece]
    tones: list[list[Float]]
    border: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def size(self) -> tuple[int, int]:
        return self.labels.shape[0], self.labels.shape[1]

    def begin(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.tones.append([])


def draw_scene(rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    """Draws an image of this height and width and its labels; everything comes from the generator."""
    sheet = _draw_stuff(rng, size)
    if rng.random() < VOID_STRIP:
        sheet.border = _strip(rng, size)
    sun = rng.uniform(0, 2 * np.pi)
    if rng.random() >= NO_THINGS:
        _draw_things(rng, sheet, sun)
    top, bottom, left, right = sheet.border
    outside = np.ones(size, dtype=bool)
    outside[top : size[0] - bottom, left : size[1] - right] = False
    sheet.labels[outside] = -1
    sheet.canvas[outside] = lab_to_rgb(random_lab(rng, 1)[0]) * 0.35
    image = sheet.canvas * light(rng, size)[..., None]
    image += rng.normal(0, rng.uniform(0.008, 0.025), image.shape).astype(np.float32)
    return Scene((image.clip(0, 1) * 255 + 0.5).astype(np.uint8), sheet.labels, sheet.pieces)


def _strip(rng: np.random.Generator, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Widths of the strip without label at the top, bottom, left and right: one of the four, the others 0."""
    widths = [0, 0, 0, 0]
    side = int(rng.integers(4))
    widths[side] = round(min(size) * rng.uniform(0.05, 0.1))
    return widths[0], widths[1], widths[2], widths[3]


# --- stuff ---------------------------------------------------------------------------------------------------------


def _draw_stuff(rng: np.random.Generator, size: tuple[int, int]) -> _Sheet:
    """Sky on top, mostly hills or water in the middle, one or two kinds of ground below; curved boundaries."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    sheet = _Sheet(np.zeros((*size, 3), np.float32), np.full(size, -1, np.int16), [], [])
    horizon = wavy_line(rng, width, height * rng.uniform(0.22, 0.4), height * 0.1)
    shore = np.maximum(wavy_line(rng, width, height * rng.uniform(0.54, 0.66), height * 0.08), horizon + 0.12 * height)
    middle = rng.choice(["hills", "water", "none"], p=[0.4, 0.35, 0.25])
    ground = list(rng.permutation(["field", "tiles", "meadow"]))
    if middle != "water" and rng.random() < 0.25:
        ground.insert(int(rng.integers(2)), "water")
    regions: list[tuple[str, NDArray[np.bool_]]] = [("sky", y < horizon)]
    if middle != "none":
        regions.append((str(middle), (y >= horizon) & (y < shore)))
    rest = y >= (shore if middle != "none" else horizon)
    parting = wavy_line(rng, height, width * rng.uniform(0.3, 0.7), width * 0.14)[:, None]
    if rng.random() < 0.65:
        regions += [(str(ground[0]), rest & (x < parting)), (str(ground[1]), rest & (x >= parting))]
    else:
        regions.append((str(ground[0]), rest))
    for kind, region in regions:
        _draw_region(rng, sheet, kind, region)
    return sheet


def _draw_region(rng: np.random.Generator, sheet: _Sheet, kind: str, region: NDArray[np.bool_]) -> None:
    first = contrasting_lab(rng, [tone for tones in sheet.tones for tone in tones], distance=25.0)
    second = second_tone(rng, first)
    share = TEXTURES[kind](rng, sheet.size)[..., None]
    painted = lab_to_rgb(first) * (1 - share) + lab_to_rgb(second) * share
    if sheet.pieces:
        soft = cv2.GaussianBlur(region.astype(np.float32), (0, 0), 0.6)[..., None]
        painted = sheet.canvas * (1 - soft) + painted * soft
    sheet.canvas = painted
    sheet.begin(Piece(kind))
    sheet.tones[-1] += [first, second]
    sheet.labels[region] = len(sheet.pieces) - 1


# --- things --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Placed:
    """A thing with its coverage patch and the middle (row, column) of the patch on the image."""

    piece: Piece
    patch: Float
    row: int
    column: int

    def window(self, size: tuple[int, int]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Where the patch lies on the image, and which part of the patch that is."""
        half = self.patch.shape[0] // 2
        on_image, on_patch = [], []
        for middle, length in zip((self.row, self.column), size, strict=True):
            start, stop = max(middle - half, 0), min(middle + half + 1, length)
            on_image.append(slice(start, max(start, stop)))
            on_patch.append(slice(start - middle + half, max(start, stop) - middle + half))
        return (on_image[0], on_image[1]), (on_patch[0], on_patch[1])


def _draw_things(rng: np.random.Generator, sheet: _Sheet, sun: float) -> None:
    while True:
        crowd = _plan_crowd(rng, sheet) if rng.random() < CROWD else []
        things = _plan_things(rng, sheet, crowd)
        if _all_recognisable(things, sheet.size):
            break
    if crowd:
        sheet.begin(Piece(crowd[0].piece.kind, is_crowd=True))
        for member in crowd:
            _draw_thing(rng, sheet, member, sun)
    for thing in things:
        sheet.begin(thing.piece)
        _draw_thing(rng, sheet, thing, sun)


def _new_thing(rng: np.random.Generator, kind: str, diameter: float) -> _Placed:
    patch = silhouette(kind, diameter, angle=rng.uniform(0, 2 * np.pi), stretch=rng.uniform(0.92, 1.08))
    return _Placed(Piece(kind, diameter=diameter), patch, 0, 0)


def _random_kind(rng: np.random.Generator) -> str:
    return list(SILHOUETTES)[int(rng.integers(len(SILHOUETTES)))]


def _plan_crowd(rng: np.random.Generator, sheet: _Sheet) -> list[_Placed]:
    """Small things of one kind on a shaken lattice."""
    unit = min(sheet.size) / 192
    kind, count, pitch = _random_kind(rng), int(rng.integers(7, 14)), 13 * unit
    row, column = _random_middle(rng, sheet, 40 * unit)
    cells = [(i, j) for i in range(-2, 3) for j in range(-2, 3)]
    cells.sort(key=lambda cell: cell[0] ** 2 + cell[1] ** 2)
    members = []
    for i, j in cells[:count]:
        member = _new_thing(rng, kind, rng.uniform(9, 11.5) * unit)
        shake_row, shake_column = rng.uniform(-2 * unit, 2 * unit, 2)
        member.row, member.column = round(row + i * pitch + shake_row), round(column + j * pitch + shake_column)
        members.append(member)
    return members


def _plan_things(rng: np.random.Generator, sheet: _Sheet, crowd: list[_Placed]) -> list[_Placed]:
    """3 to 12 things, in the order in which they are laid down; about every third lies over an earlier one.

    Number and sizes are drawn before the kinds, and no kind is ever left out for want of room, so that number and
    size say nothing about the kind.
    """
    count = int(rng.integers(3, 13))
    low, high = (diameter * min(sheet.size) / 192 for diameter in DIAMETERS)
    area = np.inf
    while area > _MOST_THINGS_AREA * sheet.labels.size:
        diameters = low * (high / low) ** rng.random(count)
        area = float(np.sum(np.pi / 4 * diameters**2))
    covering = np.zeros(count, dtype=bool)
    covering[1 + rng.permutation(count - 1)[: -(-(count + 1) // 3)]] = True
    things: list[_Placed] = []
    for diameter, over in zip(diameters, covering, strict=True):
        thing = _new_thing(rng, _random_kind(rng), float(diameter))
        if not (over and _place_over(rng, sheet, thing, things, crowd)):
            _place_freely(rng, sheet, thing, things + crowd)
        things.append(thing)
    return things


def _random_middle(rng: np.random.Generator, sheet: _Sheet, margin: float) -> tuple[int, int]:
    (height, width), (top, bottom, left, right) = sheet.size, sheet.border
    row = rng.uniform(top + margin, max(height - bottom - margin, top + margin + 1))
    column = rng.uniform(left + margin, max(width - right - margin, left + margin + 1))
    return int(row), int(column)


def _clearance(thing: _Placed, others: list[_Placed]) -> float:
    """Distance to the nearest other thing, both taken as disks a little larger than their area."""
    gaps = [
        np.hypot(thing.row - other.row, thing.column - other.column)
        - 0.6 * (thing.piece.diameter + other.piece.diameter)
        for other in others
    ]
    return float(min(gaps, default=np.inf))


def _place_freely(rng: np.random.Generator, sheet: _Sheet, thing: _Placed, others: list[_Placed]) -> None:
    """Somewhere apart from all others, or the best of sixty tries."""
    best = (-np.inf, 0, 0)
    for _ in range(60):
        thing.row, thing.column = _random_middle(rng, sheet, 0.5 * thing.piece.diameter)
        best = max(best, (_clearance(thing, others), thing.row, thing.column))
        if best[0] > 0:
            break
    _, thing.row, thing.column = best


def _place_over(
    rng: np.random.Generator, sheet: _Sheet, thing: _Placed, others: list[_Placed], crowd: list[_Placed]
) -> bool:
    """So that it hides part of an earlier thing and nothing of the rest; False if forty tries found no such place."""
    (height, width), (top, bottom, left, right) = sheet.size, sheet.border
    margin = 0.4 * thing.piece.diameter
    for _ in range(40):
        target = others[int(rng.integers(len(others)))]
        reach = (thing.piece.diameter + target.piece.diameter) * rng.uniform(0.3, 0.55)
        angle = rng.uniform(0, 2 * np.pi)
        thing.row = round(target.row + reach * np.sin(angle))
        thing.column = round(target.column + reach * np.cos(angle))
        inside = top + margin < thing.row < height - bottom - margin
        inside &= left + margin < thing.column < width - right - margin
        rest = [other for other in others if other is not target]
        if not inside or _clearance(thing, rest + crowd) < 0:
            continue
        mask = _mask(target, sheet.size)
        if _COVER[0] < np.mean(_mask(thing, sheet.size)[mask]) < _COVER[1]:
            return True
    return False


def _mask(thing: _Placed, size: tuple[int, int]) -> NDArray[np.bool_]:
    mask = np.zeros(size, dtype=bool)
    on_image, on_patch = thing.window(size)
    mask[on_image] = thing.patch[on_patch] >= 0.5
    return mask


def _all_recognisable(things: list[_Placed], size: tuple[int, int]) -> bool:
    """At least half of every thing is to be seen."""
    taken = np.zeros(size, dtype=bool)
    for thing in reversed(things):
        mask = _mask(thing, size)
        if np.mean(taken[mask]) > 0.5:
            return False
        taken |= mask
    return True


def _draw_thing(rng: np.random.Generator, sheet: _Sheet, thing: _Placed, sun: float) -> None:
    """Paints a thing over what is there, as a part of the piece begun last."""
    on_image, on_patch = thing.window(sheet.size)
    patch, below = thing.patch, sheet.labels[on_image]
    under = [tone for i in np.unique(below[below >= 0]) for tone in sheet.tones[i]]
    lab = contrasting_lab(rng, under)
    diameter = thing.piece.diameter
    # A soft shadow away from the sun, a slope of light across the thing, a darker rim.
    shift = np.array([(1, 0, 0.06 * diameter * np.cos(sun)), (0, 1, 0.06 * diameter * np.sin(sun))], dtype=np.float32)
    shadow = cv2.GaussianBlur(cv2.warpAffine(patch, shift, patch.shape), (0, 0), max(0.03 * diameter, 0.8))
    y, x = np.mgrid[-1 : 1 : patch.shape[0] * 1j, -1 : 1 : patch.shape[0] * 1j].astype(np.float32)
    shade = 1 - rng.uniform(0.08, 0.25) * (np.cos(sun) * x + np.sin(sun) * y)
    shade *= 1 + 0.04 * smooth_noise(rng, patch.shape, max(diameter / 3, 3))
    rim = patch - cv2.erode(cv2.GaussianBlur(patch, (0, 0), 0.7), np.ones((3, 3), np.uint8))
    shade = shade * (1 - 0.5 * rim.clip(0, 1))
    alpha = patch[on_patch][..., None]
    ground = sheet.canvas[on_image] * (1 - 0.4 * shadow[on_patch][..., None])
    sheet.canvas[on_image] = ground * (1 - alpha) + lab_to_rgb(lab) * shade[on_patch][..., None] * alpha
    sheet.tones[-1].append(lab)
    below[patch[on_patch] >= 0.5] = len(sheet.pieces) - 1
