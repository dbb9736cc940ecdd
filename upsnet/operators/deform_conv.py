"""Deformable convolution, v1 and modulated: the native kernel where it covers the call, torchvision's elsewhere."""

from collections.abc import Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor

from upsnet.operators import library
from upsnet.operators.images import empty_images

Pair = int | tuple[int, int]
HALVES = (torch.bfloat16, torch.float16)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """A convolution whose taps sample the input bilinearly at offset places (Dai et al. 2017, eq. 2).

    Signature and values are those of `torchvision.ops.deform_conv2d`. A sample outside the input counts as 0; one
    within a pixel of the border fades towards 0. The output has the input's memory format (channels-last is the fast
    one) and dtype. Sums are formed in float32 at least; places are never rounded to half precision: with a half
    precision input `offset` and `mask` may be float32, and under autocast they stay so while the rest is cast.

    Args:
        input: (N, C, H, W).
        offset: (N, 2·G·kh·kw, H', W'), in input pixels: dy, dx of every tap in row-major order; G offset groups.
        weight: (O, C / weight groups, kh, kw).
        bias: (O,), or none.
        stride, padding, dilation: one number, or (vertical, horizontal).
        mask: (N, G·kh·kw, H', W'), a factor for every sample (Zhu et al. 2019, eq. 1), or none.

    Returns:
        (N, O, H', W').

    Raises:
        ValueError: a shape or dtype that does not fit, by the tensor's name.
    """
    geometry = _pair(stride), _pair(padding), _pair(dilation)
    device = input.device.type
    if not torch.is_autocast_enabled(device):
        return _compute(input, offset, weight, bias, mask, *geometry)
    cast = _autocast(torch.get_autocast_dtype(device), input, offset, weight, bias, mask, *geometry)
    with torch.autocast(device, enabled=False):
        return _compute(*cast)


def _compute(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    _check_types(input, offset, weight, bias, mask)
    _check_shapes(input, offset, weight, bias, mask, stride, padding, dilation)
    given = input.dtype
    if given in HALVES:
        offset, mask = offset.float(), None if mask is None else mask.float()
        if not library.covers("deform_conv2d", input, weight):
            input, weight, bias = input.float(), weight.float(), None if bias is None else bias.float()
    if library.covers("deform_conv2d", input, weight):
        result: Tensor = torch.ops.upsnet.deform_conv2d(input, offset, weight, bias, mask, stride, padding, dilation)
    else:
        result = torchvision.ops.deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)
    return result.to(given)


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _check_types(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> None:
    given = input.dtype
    if not given.is_floating_point:
        raise ValueError(f"deform_conv2d: input is of {given}, a floating point type is expected")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != given:
            raise ValueError(f"deform_conv2d: {name} is of {tensor.dtype}, input of {given}")
    allowed = (given, torch.float32) if given in HALVES else (given,)
    for name, tensor in (("offset", offset), ("mask", mask)):
        if tensor is not None and tensor.dtype not in allowed:
            raise ValueError(
                f"deform_conv2d: {name} is of {tensor.dtype}, {' or '.join(map(str, allowed))} is expected"
            )


def _check_shapes(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    for name, tensor in (("input", input), ("offset", offset), ("weight", weight), ("mask", mask)):
        if tensor is not None and tensor.dim() != 4:
            raise ValueError(f"deform_conv2d: {name} has shape {tuple(tensor.shape)}, four dimensions are expected")
    images, channels, height, width = input.shape
    outputs, _, kernel_h, kernel_w = weight.shape
    if weight.shape[1] == 0 or channels % weight.shape[1]:
        raise ValueError(f"deform_conv2d: weight wants {weight.shape[1]} input channels, input has {channels}")
    if outputs % (channels // weight.shape[1]):
        raise ValueError(f"deform_conv2d: weight has {outputs} outputs for {channels // weight.shape[1]} weight groups")
    if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0:
        raise ValueError(
            f"deform_conv2d: stride {stride} and dilation {dilation} must be positive, padding {padding} not negative"
        )
    size = tuple(
        (length + 2 * pad - gap * (kernel - 1) - 1) // step + 1
        for length, pad, gap, kernel, step in zip(
            (height, width), padding, dilation, (kernel_h, kernel_w), stride, strict=True
        )
    )
    if min(size) < 1:
        raise ValueError(f"deform_conv2d: input of {height}x{width} pixels is too small for the kernel")
    taps = kernel_h * kernel_w
    groups = offset.shape[1] // (2 * taps)
    if groups == 0 or channels % groups or offset.shape != (images, 2 * taps * groups, *size):
        wanted = (images, f"{2 * taps}·groups", *size)
        raise ValueError(f"deform_conv2d: offset has shape {tuple(offset.shape)}, {wanted} is expected")
    if mask is not None and mask.shape != (images, taps * groups, *size):
        wanted_mask = (images, taps * groups, *size)
        raise ValueError(f"deform_conv2d: mask has shape {tuple(mask.shape)}, {wanted_mask} is expected")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"deform_conv2d: bias has shape {tuple(bias.shape)}, ({outputs},) is expected")


# -- what torch is to know about the native operator -------------------------------------------------------------------


def _autocast(
    dtype: torch.dtype,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    *geometry: Any,
) -> tuple[Any, ...]:
    """Features and weights go to autocast's type; places go to float32, as a bfloat16 of 300 pixels is even."""
    if input.dtype == torch.float64:  # as torch's own rules leave it
        return input, offset, weight, bias, mask, *geometry
    cast = [None if tensor is None else tensor.to(dtype) for tensor in (input, weight, bias)]
    return cast[0], offset.float(), *cast[1:], None if mask is None else mask.float(), *geometry


def _out_size(size: Any, kernel: Any, stride: int, padding: int, dilation: int) -> Any:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _shape(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    size = [_out_size(input.shape[2 + i], weight.shape[2 + i], stride[i], padding[i], dilation[i]) for i in range(2)]
    return empty_images(input, (input.shape[0], weight.shape[0], *size))


def _shape_of_gradients(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, ...]:
    mask_shape = mask.shape if mask is not None else (input.shape[0], 0, *offset.shape[2:])
    return (
        empty_images(input, input.shape),
        offset.new_empty(offset.shape),
        input.new_empty(weight.shape),
        input.new_empty(weight.shape[0]),
        offset.new_empty(mask_shape),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, offset, weight, bias, mask, ctx.stride, ctx.padding, ctx.dilation = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(input, offset, weight, mask)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, offset, weight, mask = ctx.saved_tensors
    grad_input, grad_offset, grad_weight, grad_bias, grad_mask = torch.ops.upsnet.deform_conv2d_backward(
        grad, input, offset, weight, mask, ctx.stride, ctx.padding, ctx.dilation
    )
    optional = (grad_bias if ctx.has_bias else None, grad_mask if mask is not None else None)
    return grad_input, grad_offset, grad_weight, *optional, None, None, None


def _forward_in_triton(*arguments: Any) -> Tensor:
    from upsnet.operators import deform_conv_triton  # here, since not every machine has Triton

    return deform_conv_triton.forward(*arguments)


def _backward_in_triton(*arguments: Any) -> tuple[Tensor, ...]:
    from upsnet.operators import deform_conv_triton_backward

    return deform_conv_triton_backward.backward(*arguments)


library.register("deform_conv2d", _shape, _gradient, _save_for_backward, _autocast, _forward_in_triton)
library.register("deform_conv2d_backward", _shape_of_gradients, library.differentiated_once, triton=_backward_in_triton)
