"""The learning rate as a pure function of the iteration."""

import math
from collections.abc import Sequence
from typing import Literal

ScheduleKind = Literal["step", "poly", "cosine"]


def learning_rate(
    iteration: int,
    base: float,
    max_iteration: int,
    decay_iterations: Sequence[int] = (),
    warmup: int = 0,
    kind: ScheduleKind = "step",
) -> float:
    """The rate of the step that leads from `iteration` (0 = first) to the next.

    step: base · 0.1^(decay points ≤ iteration). poly: base · (1 - i/max)^0.9 (DeepLab, Chen et al. 2018, sec. 3.1).
    cosine: base · (1 + cos(π i/max)) / 2 (SGDR, Loshchilov & Hutter 2017, eq. 5, one period).

    During the first `warmup` iterations the rate rises linearly from a tenth of the base to the base (Goyal et al.
    2017, sec. 2.2); poly and cosine take the smaller of the ramp and themselves, step knows no decay there.
    """
    ramp = math.inf
    if iteration < warmup:
        progress = iteration / warmup
        ramp = base * (0.1 * (1 - progress) + progress)
    if kind == "step":
        decays = sum(point <= iteration for point in decay_iterations)
        return ramp if iteration < warmup else base * 0.1**decays
    if kind == "poly":
        return min(ramp, base * (1 - iteration / max_iteration) ** 0.9)
    return min(ramp, base * 0.5 * (1 + math.cos(math.pi * iteration / max_iteration)))
