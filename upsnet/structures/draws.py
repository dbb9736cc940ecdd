"""Random draws as a function of (seed, step, image), never of worker, device or order of arrival."""

import hashlib
from typing import Protocol

import torch
from torch import Tensor

from upsnet.structures.transfer import upload


class Draws(Protocol):
    """What the matching and sampling functions need; tests pass recorded draws instead."""

    def first(self, eligible: Tensor, size: int) -> Tensor:
        """min(size, N) different positions, the eligible ones first and in random order.

        Where fewer are eligible, others follow: so the shape is known without asking the device how many there are.

        Args:
            eligible: N bool.
        """


class SeededDraws:
    """Draws for one image of one step: the same key gives the same sequence on every machine and device.

    A choice depends on the row of the eligible alone, not on what lies between and after them, such as padding.
    """

    def __init__(self, *key: int) -> None:
        self.generator = torch.Generator().manual_seed(seed_of(*key))
        self._key, self._choices = key, 0

    def first(self, eligible: Tensor, size: int) -> Tensor:
        # The k-th eligible gets the k-th number. A longer row takes more numbers, hence a generator for each choice.
        generator = torch.Generator().manual_seed(seed_of(*self._key, self._choices))
        self._choices += 1
        numbers = torch.empty(len(eligible), dtype=torch.int64).random_(generator=generator)
        place = (eligible.cumsum(0) - 1).clamp(min=0)
        rank = torch.where(eligible, upload(numbers, eligible.device)[place], -1)
        return rank.topk(min(size, len(eligible))).indices

    def integer(self, below: int) -> int:
        """A uniform integer in 0..below-1."""
        return int(torch.randint(below, (), generator=self.generator))


def seed_of(*key: int) -> int:
    """A 63-bit seed from a key of integers. Neighbouring keys give unrelated seeds."""
    digest = hashlib.blake2b(",".join(str(int(k)) for k in key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
