"""The learning rate as a pure function of the iteration."""

from collections.abc import Sequence
from typing import Literal

ScheduleKind = Literal["step", "poly"]


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

    During the first `warmup` iterations the rate rises linearly from a tenth of the base to the base (Goyal et al.
    2017, sec. 2.2); poly takes the smaller of the ramp and itself, step knows no decay there.
    """
    if kind == "step":
        falling = base * 0.1 ** sum(point <= iteration for point in decay_iterations)
    else:
        falling = base * (1 - iteration / max_iteration) ** 0.9
    if iteration >= warmup:
        return falling
    progress = iteration / warmup
    ramp = base * (0.1 * (1 - progress) + progress)
    return ramp if kind == "step" else min(ramp, falling)
