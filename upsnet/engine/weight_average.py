"""An average of the weights over the steps of a training, which often predicts better than the last ones."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of a network's trained weights, in float32 like them.

    After step t: a ← d·a + (1 - d)·w with d = min(decay, (1 + t) / (10 + t)), so that a young average soon forgets the
    weights that it began with (as TensorFlow's ExponentialMovingAverage does). Frozen weights need none, running
    statistics of norms are averages already.
    """

    def __init__(self, network: nn.Module, decay: float | None, raw: Mapping[str, Tensor] | None = None) -> None:
        """Args:
        network: its weights are what the average begins with, or goes on from.
        decay: below 1; None: nothing is averaged, and `applied` changes nothing.
        raw: trained weights by name, as an earlier average's `applied` gave them; the network goes on with these.
        """
        trained: dict[str, Tensor] = {name: w for name, w in network.named_parameters() if w.requires_grad}
        self._decay = decay
        self._weights = trained if decay is not None else {}
        self._averages = {name: weight.detach().clone() for name, weight in self._weights.items()}
        with torch.no_grad():
            for name, weight in (raw or {}).items():
                trained[name].copy_(weight)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """To be called after the step-th update of the weights, counted from 1."""
        if self._decay is not None:
            decay = min(self._decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self._averages.values()), list(self._weights.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[Mapping[str, Tensor]]:
        """Inside, the network has the averaged weights; given are its own ones by name, none without an average."""
        self._swap()
        try:
            yield self._averages
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights.items():
            kept = weight.clone()
            weight.copy_(self._averages[name])
            self._averages[name].copy_(kept)
