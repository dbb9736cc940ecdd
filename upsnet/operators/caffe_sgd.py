"""A step of SGD in Caffe's form over many parameters at once."""

import torch
from torch import Tensor

from upsnet.operators import library


@torch.no_grad()
def caffe_sgd_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    rate: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """v ← momentum·v + rate·(∇w + weight_decay·w);  w ← w - v, in place, for every parameter w and its buffer v.

    Native on the CPU: one pass over the memory. Elsewhere (on CUDA each call is one launch for many tensors already)
    and in other dtypes four calls of `torch._foreach_*`, with the same roundings.

    Args:
        parameters, gradients, buffers: equally many; each three of one shape, laid out in memory as they may.

    Raises:
        ValueError: lists or shapes that do not fit, by name.
    """
    for name, tensors in (("gradients", gradients), ("buffers", buffers)):
        if len(tensors) != len(parameters):
            raise ValueError(f"caffe_sgd_: {name} has {len(tensors)} tensors, parameters has {len(parameters)}")
        for i, (tensor, parameter) in enumerate(zip(tensors, parameters, strict=True)):
            if tensor.shape != parameter.shape:
                wanted = tuple(parameter.shape)
                raise ValueError(f"caffe_sgd_: {name}[{i}] has shape {tuple(tensor.shape)}, {wanted} is expected")
    if not parameters:
        return
    if library.covers("caffe_sgd_", *parameters, *gradients, *buffers):
        torch.ops.upsnet.caffe_sgd_(parameters, gradients, buffers, rate, momentum, weight_decay)
        torch.autograd.graph.increment_version([*parameters, *buffers])  # as torch's own operators in place do
        return
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, gradients, alpha=rate)
    if weight_decay:
        torch._foreach_add_(buffers, parameters, alpha=rate * weight_decay)
    torch._foreach_sub_(parameters, buffers)


# -- what torch is to know about the native operator -------------------------------------------------------------------


def _shape(
    parameters: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    rate: float,
    momentum: float,
    weight_decay: float,
) -> None:
    return None


library.register("caffe_sgd_", _shape)
