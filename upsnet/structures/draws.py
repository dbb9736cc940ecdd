"""Random draws as a function of (seed, step, image), never of worker, device or order of arrival."""

import hashlib
from typing import Protocol

import torch
from torch import Tensor


class Draws(Protocol):
    """What the matching and sampling functions need; tests pass recorded draws instead."""

    def choose(self, candidates: Tensor, size: int) -> Tensor:
        """`size` of the N candidates without replacement, in random order (size ≤ N)."""


class SeededDraws:
    """Draws for one image of one step: the same key gives the same sequence on every machine and device."""

    def __init__(self, *key: int) -> None:
        self.generator = torch.Generator().manual_seed(seed_of(*key))

    def choose(self, candidates: Tensor, size: int) -> Tensor:
        order = torch.randperm(len(candidates), generator=self.generator)[:size]
        return candidates[order.to(candidates.device)]

    def integer(self, below: int) -> int:
        """A uniform integer in 0..below-1."""
        return int(torch.randint(below, (), generator=self.generator))


def seed_of(*key: int) -> int:
    """A 63-bit seed from a key of integers. Neighbouring keys give unrelated seeds."""
    digest = hashlib.blake2b(",".join(str(int(k)) for k in key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
