"""Curves of a training as inline SVG: one small chart for every loss and metric of metrics.jsonl."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 30, 24
MOST_POINTS = 300
NOT_DRAWN = {"iteration", "epoch", "time", "memory", "images_per_second", "data_seconds"}


def draw_curves(history: Sequence[Mapping[str, Any]]) -> str:
    """HTML with one chart a quantity, "total" first and "lr" last; "" where the history has no numbers.

    A quantity `val_x` is drawn with `x`. Values that are not finite are left out. The axis of a quantity that spans
    more than a factor 30, its noise smoothed away, is logarithmic.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for line in history:
        for name, value in line.items():
            if name in NOT_DRAWN or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if "iteration" in line and math.isfinite(value):
                series.setdefault(name, []).append((float(line["iteration"]), float(value)))
    names = dict.fromkeys(name.removeprefix("val_") for name in series)
    ordered = sorted(names, key=lambda name: {"total": 0, "lr": 2}.get(name, 1))
    charts = "".join(_chart(name, series.get(name, []), series.get(f"val_{name}", [])) for name in ordered)
    return f'<div class="charts">{charts}</div>' if charts else ""


def _chart(name: str, training: list[tuple[float, float]], validation: list[tuple[float, float]]) -> str:
    drawn = {"train": training, "val": validation}
    styled = {style: np.array(points, dtype=np.float64) for style, points in drawn.items() if points}
    lines = list(styled.values())
    x_low, x_high = min(line[:, 0].min() for line in lines), max(line[:, 0].max() for line in lines)
    values = np.concatenate([line[:, 1] for line in lines])
    calm = np.concatenate([_smooth(line[:, 1]) for line in lines])
    logarithmic = bool(calm.min() > 0 and calm.max() > 30 * calm.min() and name != "lr")
    low, high = _span(np.maximum(values, calm.min() / 2) if logarithmic else values, logarithmic)

    def place(line: Values) -> Values:
        ys = np.log10(np.maximum(line[:, 1], 10.0**low)) if logarithmic else line[:, 1]
        xs = LEFT + (line[:, 0] - x_low) / max(x_high - x_low, 1e-9) * (WIDTH - LEFT - RIGHT)
        return np.stack([xs, HEIGHT - BOTTOM - (ys - low) / (high - low) * (HEIGHT - TOP - BOTTOM)], axis=1)

    body = [_axes(low, high, logarithmic, x_low, x_high)]
    for style, line in styled.items():
        thinned = _thin(line)
        smooth = np.stack([thinned[:, 0], _smooth(thinned[:, 1])], axis=1)
        if len(thinned) >= 12 and style == "train" and name != "lr":
            body.append(_polyline(place(thinned), f"{style} raw"))
            thinned = smooth
        body.append(_polyline(place(thinned), style))
    last = f"{lines[0][-1, 1]:.3g}" + (f" · val {validation[-1][1]:.3g}" if training and validation else "")
    label = escape(name)
    spoken = f"{label}: from {lines[0][0, 1]:.3g} to {last}"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{spoken}">'
        f'<text class="name" x="{LEFT}" y="18">{label}</text>'
        f'<text class="last" x="{WIDTH - RIGHT}" y="18">{last}</text>{"".join(body)}</svg>'
    )


def _span(values: Values, logarithmic: bool) -> tuple[float, float]:
    """Lowest and highest value of the axis (their decimal logarithms on a logarithmic one)."""
    if logarithmic:
        return float(np.log10(values.min())) - 0.05, float(np.log10(values.max())) + 0.05
    low, high = float(values.min()), float(values.max())
    if low >= 0 and low < 0.5 * high:
        low = 0.0
    margin = 0.05 * (high - low) or max(abs(high) * 0.05, 1e-6)
    return (low if low == 0 else low - margin), high + margin


def _axes(low: float, high: float, logarithmic: bool, x_low: float, x_high: float) -> str:
    body = []
    for value, text in _log_ticks(low, high) if logarithmic else _ticks(low, high):
        y = HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        body.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<text class="y" x="{LEFT - 6}" y="{y + 3.5:.1f}">{text}</text>')
    for value, text in _ticks(x_low, x_high) if x_high > x_low else [(x_low, f"{x_low:g}")]:
        x = LEFT + (value - x_low) / max(x_high - x_low, 1e-9) * (WIDTH - LEFT - RIGHT)
        x = min(x, WIDTH - RIGHT - 3.5 * len(text))
        body.append(f'<text class="x" x="{x:.1f}" y="{HEIGHT - 6}">{text}</text>')
    return "".join(body)


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """About four round values between low and high."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    values = [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return [(value, f"{value / 1000:g}k" if abs(value) >= 10000 else f"{value:.6g}") for value in values]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten, with 2 and 5 between them on a short axis, of a logarithmic axis."""
    factors = (1, 2, 5) if high - low < 2 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 1)
    values = [math.log10(factor) + power for power in powers for factor in factors]
    return [(value, f"{10**value:.3g}") for value in values if low <= value <= high]


def _thin(line: Values) -> Values:
    """At most MOST_POINTS points: means of neighbouring ones."""
    if len(line) <= MOST_POINTS:
        return line
    return np.stack([part.mean(axis=0) for part in np.array_split(line, MOST_POINTS)])


def _smooth(values: Values) -> Values:
    """Mean over a window of a twelfth of the curve; shorter at the ends."""
    window = np.ones(2 * (len(values) // 24) + 1)
    return np.asarray(np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same"))


def _polyline(points: Values, style: str) -> str:
    if len(points) == 1:
        return f'<circle class="{style}" cx="{points[0, 0]:.1f}" cy="{points[0, 1]:.1f}" r="3"/>'
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points.tolist())
    return f'<polyline class="{style}" points="{text}"/>'
