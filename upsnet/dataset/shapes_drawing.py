"""The pens of the `shapes` data set: silhouettes of things, textures of stuff, colours and light.

Every function draws from the generator that it is given. Colours of things and stuff come from one distribution, so
that only the silhouette tells a thing and only texture and place tell a stuff class.
"""

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]
Contours = list[NDArray[np.float64]]
_OVERSAMPLING = 8


def _circle(radius: float, corners: int = 96) -> NDArray[np.float64]:
    angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _disk() -> Contours:
    return [_circle(1.0)]


def _ring() -> Contours:
    return [_circle(1.0), _circle(0.5)[::-1]]


def _triangle() -> Contours:
    return [_circle(1.0, corners=3)]


def _star() -> Contours:
    corners = _circle(1.0, corners=10)
    corners[1::2] *= 0.45
    return [corners]


def _cross() -> Contours:
    quarter = np.array([(0.3, -1.0), (0.3, -0.3), (1.0, -0.3)])
    turn = np.array([(0, 1), (-1, 0)])
    return [np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])]


def _bar() -> Contours:
    return [np.array([(-1.0, -0.32), (1.0, -0.32), (1.0, 0.32), (-1.0, 0.32)])]


SILHOUETTES: dict[str, Callable[[], Contours]] = {
    "disk": _disk,
    "ring": _ring,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "bar": _bar,
}


def silhouette(kind: str, diameter: float, angle: float, stretch: float) -> Float:
    """Coverage 0..1 of one thing on a square patch of odd side, the thing's middle on its middle pixel.

    Args:
        kind: a key of `SILHOUETTES`.
        diameter: of the disk with the same area, pixels; so a size means the same area for every kind.
        angle: radians.
        stretch: longer along one axis and shorter along the other by this factor; the area stays.
    """
    contours = SILHOUETTES[kind]()
    area = abs(sum(_signed_area(contour) for contour in contours))
    scale = diameter * np.sqrt(np.pi / 4 / area)
    turn = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
    contours = [contour * (scale * stretch, scale / stretch) @ turn for contour in contours]
    half = int(np.ceil(max(np.abs(contour).max() for contour in contours))) + 2
    side = 2 * half + 1
    canvas = np.zeros((side * _OVERSAMPLING,) * 2, dtype=np.uint8)
    fine = [np.round(((contour + half + 0.5) * _OVERSAMPLING - 0.5) * 16).astype(np.int32) for contour in contours]
    cv2.fillPoly(canvas, fine, 255, shift=4)
    return np.asarray(cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA) / 255, dtype=np.float32)


def _signed_area(contour: NDArray[np.float64]) -> float:
    x, y = contour.T
    return float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)) / 2)


# --- colours -------------------------------------------------------------------------------------------------------


def random_lab(rng: np.random.Generator, count: int) -> Float:
    """count×3 colours in CIE L*a*b*: every hue, middle lightness and chroma. Things and stuff both draw from here."""
    hue, chroma, lightness = rng.uniform((0, 12, 38), (2 * np.pi, 58, 82), (count, 3)).T
    return np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=1).astype(np.float32)


def contrasting_lab(rng: np.random.Generator, others: list[Float], distance: float = 38.0) -> Float:
    """A random colour that stands out from the others by this distance, or of twenty the one that comes closest."""
    drawn = random_lab(rng, 20)
    if not others:
        return drawn[0]
    gap = np.linalg.norm(drawn[:, None] - np.stack(others), axis=2).min(axis=1)
    return drawn[np.argmax(gap >= distance)] if gap.max() >= distance else drawn[np.argmax(gap)]


def second_tone(rng: np.random.Generator, lab: Float) -> Float:
    """A lighter or darker relative of a colour, for the other half of a texture."""
    step = rng.uniform(16, 26) * (1 if lab[0] < 60 else -1)
    return lab + np.array([step, rng.uniform(-8, 8), rng.uniform(-8, 8)], dtype=np.float32)


def lab_to_rgb(lab: Float) -> Float:
    """One colour, L*a*b* → RGB 0..1."""
    rgb = cv2.cvtColor(lab.astype(np.float32).reshape(1, 1, 3), cv2.COLOR_LAB2RGB)
    return np.asarray(rgb, dtype=np.float32).reshape(3).clip(0, 1)


# --- fields: H×W float32 -------------------------------------------------------------------------------------------


def smooth_noise(rng: np.random.Generator, size: tuple[int, int], cell: float) -> Float:
    """Random values on a lattice of this cell size (pixels), smoothly enlarged; about -1..1."""
    rows, columns = (max(int(np.ceil(length / cell)), 1) + 3 for length in size)
    lattice = rng.uniform(-1, 1, (rows, columns)).astype(np.float32)
    enlarged = np.asarray(cv2.resize(lattice, None, fx=cell, fy=cell, interpolation=cv2.INTER_CUBIC), dtype=np.float32)
    top, left = int(cell), int(cell)
    return enlarged[top : top + size[0], left : left + size[1]]


def wavy_line(rng: np.random.Generator, length: int, level: float, swing: float) -> Float:
    """A curve around `level`: two sine waves and a slope, at most `swing` pixels away from it."""
    x = np.linspace(0, 1, length, dtype=np.float32)
    slow = np.sin(2 * np.pi * (rng.uniform(0.5, 1.2) * x + rng.random()))
    fast = np.sin(2 * np.pi * (rng.uniform(1.5, 3.5) * x + rng.random()))
    return (level + swing * (0.4 * slow + 0.25 * fast + 0.35 * rng.uniform(-1, 1) * (2 * x - 1))).astype(np.float32)


def light(rng: np.random.Generator, size: tuple[int, int]) -> Float:
    """How brightly each pixel is lit: a slope across the image and soft patches, about 0.7..1.2."""
    y, x = np.mgrid[-1 : 1 : size[0] * 1j, -1 : 1 : size[1] * 1j].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    slope = rng.uniform(0.06, 0.22) * (np.cos(angle) * x + np.sin(angle) * y)
    return (0.97 + slope + 0.08 * smooth_noise(rng, size, max(size) / 3)).astype(np.float32)


# --- textures: H×W float32, 0..1, the share of the second tone -----------------------------------------------------


def _soft_step(value: Float, softness: float) -> Float:
    return 1 / (1 + np.exp(-value / softness))


def _turned(rng: np.random.Generator, size: tuple[int, int], angle: float, bend: float) -> tuple[Float, Float]:
    """Pixel coordinates u, v turned by an angle and bent a little, so that no two textures lie alike."""
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    x = x + bend * smooth_noise(rng, size, 40) + rng.uniform(0, 99)
    y = y + bend * smooth_noise(rng, size, 40) + rng.uniform(0, 99)
    return np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x


def _gradient(rng: np.random.Generator, size: tuple[int, int]) -> Float:
    y = np.linspace(0, 2, size[0], dtype=np.float32)[:, None]
    return (y + 0.12 * smooth_noise(rng, size, 60)).clip(0, 1)


def _noise(rng: np.random.Generator, size: tuple[int, int]) -> Float:
    cell = rng.uniform(4, 6)
    return _soft_step(smooth_noise(rng, size, cell) + 0.5 * smooth_noise(rng, size, 2 * cell), 0.25)


def _waves(rng: np.random.Generator, size: tuple[int, int]) -> Float:
    period, length = rng.uniform(8, 12), rng.uniform(22, 36)
    u, v = _turned(rng, size, rng.uniform(-0.12, 0.12), 3)
    return _soft_step(np.sin(2 * np.pi * (v / period + 0.28 * np.sin(2 * np.pi * u / length))), 0.3)


def _stripes(rng: np.random.Generator, size: tuple[int, int]) -> Float:
    angle = rng.uniform(np.pi / 6, np.pi / 3) * rng.choice([-1, 1])
    u, _ = _turned(rng, size, angle, 2)
    return _soft_step(np.sin(2 * np.pi * u / rng.uniform(9, 14)), 0.12)


def _checks(rng: np.random.Generator, size: tuple[int, int]) -> Float:
    u, v = _turned(rng, size, rng.uniform(-0.3, 0.3), 2)
    period = rng.uniform(15, 22)
    return _soft_step(np.sin(2 * np.pi * u / period) * np.sin(2 * np.pi * v / period), 0.06)


def _dots(rng: np.random.Generator, size: tuple[int, int]) -> Float:
    u, v = _turned(rng, size, rng.uniform(0, np.pi / 2), 3)
    period = rng.uniform(9, 13)
    return _soft_step(np.cos(2 * np.pi * u / period) + np.cos(2 * np.pi * v / period) - 0.75, 0.15)


TEXTURES: dict[str, Callable[[np.random.Generator, tuple[int, int]], Float]] = {
    "sky": _gradient,
    "hills": _noise,
    "water": _waves,
    "field": _stripes,
    "tiles": _checks,
    "meadow": _dots,
}
