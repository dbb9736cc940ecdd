"""Running statistics of batch norm that are the same however a step's images are shared out among workers."""

import torch
from torch import Tensor, nn

from upsnet.engine.shared_norms import is_own_norm
from upsnet.engine.workers import Workers


class RunningStatistics:
    """Of a network's trained batch norms: after each step those that one worker would have after the passes of all.

    A pass turns a running statistic r into (1 - m)·r + m·s; m is the momentum, s what the pass saw. From the same
    r₀ the passes of worker w of n lead to a·r₀ + b_w, with a = (1 - m)^passes. The passes of all, those of worker 0
    first, would lead to aⁿ·r₀ + Σ a^(n-1-w)·b_w: a sum over workers.
    """

    def __init__(self, network: nn.Module, workers: Workers) -> None:
        # The statistics of norms over all workers are the same everywhere already.
        own = [norm for norm in network.modules() if is_own_norm(norm) and norm.track_running_stats]
        self._norms = own if workers.count > 1 else []
        self._workers = workers
        if self._norms:
            self._remember()

    @torch.no_grad()
    def merge(self) -> None:
        """To be called after the passes of a step, on every worker."""
        if not self._norms:
            return
        count, rank = self._workers.count, self._workers.rank
        kept = self._kept()
        share = (self._flat() - kept * self._before) * kept ** (count - 1 - rank)
        if rank == 0:
            share += kept**count * self._before
        merged = self._workers.sum(share)
        statistics = self._statistics()
        for statistic, value in zip(statistics, merged.split([len(s) for s in statistics]), strict=True):
            statistic.copy_(value)
        for passes, before in zip(self._passes(), self._passes_before, strict=True):
            passes += (count - 1) * (passes - before)
        self._remember()

    def _remember(self) -> None:
        self._before = self._flat()
        self._passes_before = [passes.clone() for passes in self._passes()]

    def _kept(self) -> Tensor:
        """What the passes of this step have left of each statistic: (1 - m)^passes."""
        factors = []
        for norm, passes, before in zip(self._norms, self._passes(), self._passes_before, strict=True):
            assert norm.momentum is not None
            factors.append(((1 - norm.momentum) ** (passes - before).double()).expand(2 * norm.num_features))
        return torch.cat(factors)

    def _flat(self) -> Tensor:
        return torch.cat(self._statistics()).double()

    def _statistics(self) -> list[Tensor]:
        found = [statistic for norm in self._norms for statistic in (norm.running_mean, norm.running_var)]
        return [statistic for statistic in found if statistic is not None]

    def _passes(self) -> list[Tensor]:
        return [norm.num_batches_tracked for norm in self._norms if norm.num_batches_tracked is not None]
