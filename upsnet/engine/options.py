"""How to train, in plain values."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from upsnet.engine.precision import Precision
from upsnet.engine.schedule import ScheduleKind, learning_rate


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """How to train.

    max_iteration: optimiser steps in all. steps_per_epoch: optimiser steps in one pass over the data.
    accumulation: batches in one optimiser step. loss_weights: factors of losses in the total, 1 where not named.
    clip_gradient: greatest norm of all gradients together. ema: decay of the average of the weights. None: neither.
    display_iter, snapshot_step, test_step: steps between two log lines, two snapshots, two tests (None: none).
    The rest: see `learning_rate`.
    """

    max_iteration: int
    steps_per_epoch: int
    lr: float
    lr_schedule: ScheduleKind = "step"
    decay_iterations: tuple[int, ...] = ()
    warmup_iterations: int = 0
    accumulation: int = 1
    loss_weights: Mapping[str, float] = field(default_factory=dict)
    precision: Precision = "fp32"
    clip_gradient: float | None = None
    ema: float | None = None
    seed: int = 0
    display_iter: int = 20
    snapshot_step: int = 2000
    test_step: int | None = None

    def learning_rate(self, iteration: int) -> float:
        return learning_rate(
            iteration, self.lr, self.max_iteration, self.decay_iterations, self.warmup_iterations, self.lr_schedule
        )

    def total(self, losses: Mapping[str, float]) -> float:
        """The weighted sum."""
        return sum(self.loss_weights.get(name, 1.0) * value for name, value in losses.items())
