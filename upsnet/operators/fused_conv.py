"""Convolution, addition and ReLU in one pass over memory; and linear layers as convolutions. For prediction.

On the CPU torch's convolution library does all three at once. PyTorch reaches it through operators that it keeps for
its compiler and promises to nobody; so each process tries them once, and where they are missing, refuse or answer
otherwise than expected, plain operators serve with the same results.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[int, int]

FEWEST_ROWS = 256
"""Fewer vectors do not repay that the library brings the weights into an order of its own, each time."""


def fused_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    relu: bool = False,
    add: Tensor | None = None,
) -> Tensor:
    """conv(input) + add, through a ReLU where asked for.

    Args:
        input: (N, C, H, W); channels-last is the fast format. It and `add` are brought to the weight's dtype.
        weight: (O, C, kh, kw). bias: (O,), or none.
        add: of the result's shape. It may be overwritten, so nobody may need it any more.

    Returns:
        (N, O, H', W') in the weight's dtype; channels-last if the weight is.

    Raises:
        ValueError: a shape that does not fit, by the tensor's name.
    """
    shape = _output_shape(input, weight, stride, padding)
    if add is not None and add.shape != shape:
        raise ValueError(f"fused_conv2d: add has shape {tuple(add.shape)}, {shape} is expected")
    input, add = input.to(weight.dtype), None if add is None else add.to(weight.dtype)
    if _library_takes(input, weight) and 0 not in shape:
        return _fused(input, weight, bias, stride, padding, relu, add)
    result = F.conv2d(input, weight, bias, stride, padding)
    if add is not None:
        result = result + add if torch.is_grad_enabled() else result.add_(add)
    return F.relu(result, inplace=True) if relu else result


def fast_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` for R×K vectors; on the CPU, for many of them in float32, as a 1×1 convolution, almost twice as fast
    as a product of matrices.

    The input is brought to the weight's dtype.
    """
    input = input.to(weight.dtype)
    many = len(input) >= FEWEST_ROWS and weight.dtype == torch.float32
    if not many or not _library_takes(input, weight):
        return F.linear(input, weight, bias)
    # 1×K×R×1; a dimension of size 1 at the end would hide from the library that it lies channels-last.
    maps = input[None, :, None].permute(0, 3, 1, 2)
    return fused_conv2d(maps, weight[:, :, None, None], bias)[0, :, :, 0].t()


def _output_shape(input: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> tuple[int, ...]:
    if weight.dim() != 4:
        raise ValueError(f"fused_conv2d: weight has shape {tuple(weight.shape)}, four dimensions are expected")
    if input.dim() != 4 or input.shape[1] != weight.shape[1]:
        wanted = f"(images, {weight.shape[1]}, height, width)"
        raise ValueError(f"fused_conv2d: input has shape {tuple(input.shape)}, {wanted} is expected")
    size = [
        (length + 2 * pad - kernel) // step + 1
        for length, pad, kernel, step in zip(input.shape[2:], padding, weight.shape[2:], stride, strict=True)
    ]
    return input.shape[0], weight.shape[0], *size


def _library_takes(input: Tensor, weight: Tensor) -> bool:
    learns = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
    return (
        input.device.type == weight.device.type == "cpu"
        and not learns
        and not torch.compiler.is_compiling()  # a compiler wants to look into it
        and _library_fuses(weight.dtype)
    )


def _fused(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, relu: bool, add: Tensor | None
) -> Tensor:
    # Weights stay in their plain order. In an order of the library's own, chosen for another size of the input than the
    # one that comes, some layers took ten times as long; in the best one hardly any was faster.
    operators, fixed = torch.ops.mkldnn, (weight, bias, padding, stride, (1, 1), 1)
    input = input.contiguous(memory_format=torch.channels_last)
    result: Tensor
    if add is None:
        result = operators._convolution_pointwise(input, *fixed, "relu" if relu else "none", [], "")
    else:
        add = add.contiguous(memory_format=torch.channels_last)
        after = "relu" if relu else None
        result = operators._convolution_pointwise_.binary(add, input, *fixed, "add", 1.0, after, [], "")
    return result


@cache
def _library_fuses(dtype: torch.dtype) -> bool:
    """Whether the library's operators are there, take this dtype and give what plain ones give."""
    if not torch.backends.mkldnn.is_available():
        return False
    input = torch.arange(1.0, 33.0).reshape(1, 2, 4, 4).to(dtype, memory_format=torch.channels_last) / 32
    weight = torch.arange(-9.0, 9.0).reshape(1, 2, 3, 3).to(dtype, memory_format=torch.channels_last) / 16
    with torch.autocast("cpu", enabled=False):
        plain = F.conv2d(input.float(), weight.float(), padding=1)
    try:
        alone = _fused(input, weight, None, (1, 1), (1, 1), True, None)
        added = _fused(input, weight, None, (1, 1), (1, 1), True, input[:, :1].clone())
    except (AttributeError, RuntimeError, TypeError):  # not there; not for this machine or dtype; another signature
        return False
    expected = plain.relu(), (plain + input[:, :1].float()).relu()
    return all(
        found.dtype == dtype and torch.allclose(found.float(), wanted, rtol=0.02, atol=0.02)
        for found, wanted in zip((alone, added), expected, strict=True)
    )
