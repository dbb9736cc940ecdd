"""The number format of forward passes."""

from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]


DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of matrix products, by precision."""


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """A context in which matrix products run in bf16 or fp16; for fp32 it does nothing."""
    enabled = precision != "fp32"
    return torch.autocast(device.type, dtype=DTYPES[precision] if enabled else None, enabled=enabled)
