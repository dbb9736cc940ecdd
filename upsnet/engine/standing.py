"""Where a training stands between two steps: what goes into a snapshot, and to workers that come."""

import io
import logging
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from upsnet.engine.snapshots import ResumeState, Snapshots
from upsnet.engine.weight_average import WeightAverage

logger = logging.getLogger("upsnet")


@dataclass(slots=True)
class Standing:
    """iteration: steps done; the rest as the last of them left it."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage
    seed: int
    iteration: int

    def advance(self) -> int:
        """To be called after an update of the weights; the steps done."""
        self.iteration += 1
        self.average.update(self.iteration)
        return self.iteration

    def save(self, snapshots: Snapshots) -> None:
        """As a snapshot.

        Raises:
            PlaceError: it cannot be written.
        """
        with self.average.applied() as raw:
            path = snapshots.save(self.network, self.optimizer, self._state(raw))
        logger.info("saved %s", path)

    def packed(self) -> bytes:
        """As bytes, see `unpack`."""
        with self.average.applied() as raw:
            state = self._state(raw)
            content = {
                "weights": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "state": {field.name: getattr(state, field.name) for field in fields(state)},
            }
            buffer = io.BytesIO()
            torch.save(content, buffer)
        return buffer.getvalue()

    def _state(self, raw: Any) -> ResumeState:
        return ResumeState(self.iteration, self.seed, self.scaler.state_dict(), raw)


def unpack(content: bytes, network: nn.Module, optimizer: torch.optim.Optimizer) -> ResumeState:
    """Puts what `Standing.packed` gave into a network and its optimiser, wherever they are; where training goes on."""
    kept = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    network.load_state_dict(kept["weights"])
    optimizer.load_state_dict(kept["optimizer"])
    return ResumeState(**kept["state"])
