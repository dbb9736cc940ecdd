"""Deformable convolution on the GPU in Triton: the backward pass, in two kernels that share no sums.

`_places_kernel`: a program owns the samples of one tap and offset group at a block of pixels. It forms their gradients,
grad · Wᵀ, adds them to the input gradient (atomically: places overlap) and forms the dot products that are the
gradients of offset and mask, which it alone writes.

`_weights_kernel`: a program owns channels × outputs of one tap and a share of all pixels; it samples again and
multiplies by the gradient. The shares are added afterwards in a fixed order.

Hence all gradients but the input's are the same bits in every run.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from upsnet.operators.deform_conv_triton import (
    SIZES,
    block_size,
    corner,
    element,
    gather,
    geometry,
    locate,
    sample,
    warps,
)
from upsnet.operators.images import is_channels_last

WEIGHT_PROGRAMS = 528
"""Programs of the weight gradient, about. Not read off the GPU at hand: the order of sums follows from it."""


@triton.jit(do_not_specialize=SIZES)
def _places_kernel(
    grad_input: tl.tensor, grad_offset: tl.tensor, grad_mask: tl.tensor, grad: tl.tensor, weight: tl.tensor,
    input: tl.tensor, offset: tl.tensor, mask: tl.tensor,
    height: tl.tensor, width: tl.tensor, out_width: tl.tensor, out_pixels: tl.tensor, blocks: tl.tensor,
    CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, WEIGHT_GROUPS: tl.constexpr, OFFSET_GROUPS: tl.constexpr,
    SPAN: tl.constexpr, TAPS: tl.constexpr, KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, OFFSET_LAST: tl.constexpr, MASK_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    GROUP_CHANNELS: tl.constexpr = CHANNELS // WEIGHT_GROUPS
    GROUP_OUTPUTS: tl.constexpr = OUTPUTS // WEIGHT_GROUPS
    OFFSET_CHANNELS: tl.constexpr = CHANNELS // OFFSET_GROUPS
    SPAN_BLOCKS: tl.constexpr = (SPAN + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    program = tl.program_id(0)
    tap = program % TAPS
    group = program // TAPS % OFFSET_GROUPS
    block = program // (TAPS * OFFSET_GROUPS)
    image = (block // blocks).to(tl.int64)
    pixel = block % blocks * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    is_pixel = pixel < out_pixels
    place = locate(
        offset, mask, image, pixel, group, tap, height, width, out_width, out_pixels, TAPS, KERNEL_W, OFFSET_GROUPS,
        STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W, OFFSET_LAST, MASK_LAST,
    )  # fmt: skip
    _, _, fraction_y, fraction_x, _, _, factor = place
    grad_rows = grad + (image * out_pixels + pixel) * OUTPUTS

    grad_y = tl.zeros((BLOCK_PIXELS,), tl.float32)
    grad_x = tl.zeros((BLOCK_PIXELS,), tl.float32)
    grad_factor = tl.zeros((BLOCK_PIXELS,), tl.float32)
    for step in range(OFFSET_CHANNELS // SPAN * SPAN_BLOCKS):
        local_channel = step % SPAN_BLOCKS * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
        is_channel = local_channel < SPAN
        first = group * OFFSET_CHANNELS + step // SPAN_BLOCKS * SPAN
        channel = first + local_channel
        weight_group = first // GROUP_CHANNELS
        columns = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), tl.float32)
        for begin in range(0, GROUP_OUTPUTS, BLOCK_OUTPUTS):
            output = begin + tl.arange(0, BLOCK_OUTPUTS)
            is_output = output < GROUP_OUTPUTS
            output += weight_group * GROUP_OUTPUTS
            grads = tl.load(grad_rows[:, None] + output[None, :], is_pixel[:, None] & is_output[None, :], 0.0)
            at = (tap * OUTPUTS + output)[:, None] * GROUP_CHANNELS + (channel - weight_group * GROUP_CHANNELS)[None, :]
            weights = tl.load(weight + at, is_output[:, None] & is_channel[None, :], 0.0)
            columns = tl.dot(grads, weights, columns, input_precision=PRECISION)
        for neighbour in range(4):  # one after the other: the pointers of all four would not fit into the registers
            down = neighbour // 2
            right = neighbour % 2
            found = corner(place, image, height, width, CHANNELS, down, right)
            first_channel, is_there, bilinear = found
            target = (grad_input + first_channel)[:, None] + channel[None, :]
            wanted = is_there[:, None] & is_channel[None, :]
            tl.atomic_add(target, columns * (bilinear * factor)[:, None], mask=wanted, sem="relaxed")
            dot = tl.sum(columns * gather(input, found, channel, is_channel), 1)
            grad_y += (2 * down - 1) * tl.where(right == 1, fraction_x, 1 - fraction_x) * dot
            grad_x += (2 * right - 1) * tl.where(down == 1, fraction_y, 1 - fraction_y) * dot
            grad_factor += bilinear * dot

    at = element(image, 2 * (group * TAPS + tap), pixel, 2 * OFFSET_GROUPS * TAPS, out_pixels, False)
    tl.store(grad_offset + at, (factor * grad_y).to(grad_offset.dtype.element_ty), mask=is_pixel)
    tl.store(grad_offset + at + out_pixels, (factor * grad_x).to(grad_offset.dtype.element_ty), mask=is_pixel)
    if mask is not None:
        at = element(image, group * TAPS + tap, pixel, OFFSET_GROUPS * TAPS, out_pixels, False)
        tl.store(grad_mask + at, grad_factor.to(grad_mask.dtype.element_ty), mask=is_pixel)


@triton.jit(do_not_specialize=SIZES)
def _weights_kernel(
    grad_weight: tl.tensor, grad: tl.tensor, input: tl.tensor, offset: tl.tensor, mask: tl.tensor,
    height: tl.tensor, width: tl.tensor, out_width: tl.tensor, out_pixels: tl.tensor,
    blocks: tl.tensor, all_blocks: tl.tensor, shares: tl.tensor,
    CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, WEIGHT_GROUPS: tl.constexpr, OFFSET_GROUPS: tl.constexpr,
    SPAN: tl.constexpr, TAPS: tl.constexpr, KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, OFFSET_LAST: tl.constexpr, MASK_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    GROUP_CHANNELS: tl.constexpr = CHANNELS // WEIGHT_GROUPS
    GROUP_OUTPUTS: tl.constexpr = OUTPUTS // WEIGHT_GROUPS
    SPAN_BLOCKS: tl.constexpr = (SPAN + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    CHANNEL_BLOCKS: tl.constexpr = CHANNELS // SPAN * SPAN_BLOCKS
    OUTPUT_BLOCKS: tl.constexpr = (GROUP_OUTPUTS + BLOCK_OUTPUTS - 1) // BLOCK_OUTPUTS
    program = tl.program_id(0)
    output_block = program % OUTPUT_BLOCKS
    channel_block = program // OUTPUT_BLOCKS % CHANNEL_BLOCKS
    tap = program // (OUTPUT_BLOCKS * CHANNEL_BLOCKS) % TAPS
    share = program // (OUTPUT_BLOCKS * CHANNEL_BLOCKS * TAPS)

    local_channel = channel_block % SPAN_BLOCKS * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_channel = local_channel < SPAN
    first = channel_block // SPAN_BLOCKS * SPAN
    channel = first + local_channel
    weight_group = first // GROUP_CHANNELS
    group = first // (CHANNELS // OFFSET_GROUPS)
    output = output_block * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    is_output = output < GROUP_OUTPUTS
    output += weight_group * GROUP_OUTPUTS

    total = tl.zeros((BLOCK_CHANNELS, BLOCK_OUTPUTS), tl.float32)
    for block in range(share, all_blocks, shares):
        image = (block // blocks).to(tl.int64)
        pixel = block % blocks * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        place = locate(
            offset, mask, image, pixel, group, tap, height, width, out_width, out_pixels, TAPS, KERNEL_W, OFFSET_GROUPS,
            STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W, OFFSET_LAST, MASK_LAST,
        )  # fmt: skip
        samples = sample(input, place, image, height, width, CHANNELS, channel, is_channel)
        at = (image * out_pixels + pixel)[:, None] * OUTPUTS + output[None, :]
        grads = tl.load(grad + at, mask=(pixel < out_pixels)[:, None] & is_output[None, :], other=0.0)
        total = tl.dot(tl.trans(samples.to(grads.dtype)), grads, total, input_precision=PRECISION)

    row = (share * TAPS + tap).to(tl.int64) * GROUP_CHANNELS + (channel - weight_group * GROUP_CHANNELS)
    at = row[:, None] * OUTPUTS + output[None, :]
    tl.store(grad_weight + at, total, mask=is_channel[:, None] & is_output[None, :])


def _gradients_of_places(
    shared: dict[str, Any], grad: Tensor, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of input, offset and mask."""
    images, channels, height, width = input.shape
    grad_input = torch.zeros(images, height, width, channels, dtype=torch.float32, device=input.device)
    grad_offset = offset.new_empty(offset.shape)
    mask_channels = 0 if mask is None else mask.shape[1]
    grad_mask = (offset if mask is None else mask).new_empty(images, mask_channels, *offset.shape[2:])
    sizes = {
        "BLOCK_PIXELS": block_size(shared["out_pixels"], 64),
        "BLOCK_OUTPUTS": block_size(shared["OUTPUTS"] // shared["WEIGHT_GROUPS"], 32),
        "BLOCK_CHANNELS": block_size(shared["SPAN"], 64),
    }
    blocks = triton.cdiv(shared["out_pixels"], sizes["BLOCK_PIXELS"])
    _places_kernel[(images * blocks * shared["OFFSET_GROUPS"] * shared["TAPS"],)](
        grad_input=grad_input,
        grad_offset=grad_offset,
        grad_mask=None if mask is None else grad_mask,
        grad=grad,
        weight=weight.permute(2, 3, 0, 1).to(grad.dtype).contiguous(),  # [tap, output, channel]
        blocks=blocks,
        num_warps=8,  # with 4 the addresses of the atomic sums spill
        num_stages=2,
        **shared,
        **sizes,
    )
    layout = torch.channels_last if is_channels_last(input) else torch.contiguous_format
    return grad_input.permute(0, 3, 1, 2).to(input.dtype, memory_format=layout), grad_offset, grad_mask


def _gradient_of_weight(shared: dict[str, Any], grad: Tensor, weight: Tensor) -> Tensor:
    is_half = grad.dtype != torch.float32
    group_outputs = shared["OUTPUTS"] // shared["WEIGHT_GROUPS"]
    sizes = {
        "BLOCK_PIXELS": block_size(shared["out_pixels"], 32),
        "BLOCK_OUTPUTS": block_size(group_outputs, 256 if is_half else 64),
        "BLOCK_CHANNELS": block_size(shared["SPAN"], 64),
    }
    blocks = triton.cdiv(shared["out_pixels"], sizes["BLOCK_PIXELS"])
    all_blocks = grad.shape[0] * blocks
    channel_blocks = shared["CHANNELS"] // shared["SPAN"] * triton.cdiv(shared["SPAN"], sizes["BLOCK_CHANNELS"])
    pieces = shared["TAPS"] * channel_blocks * triton.cdiv(group_outputs, sizes["BLOCK_OUTPUTS"])
    shares = min(all_blocks, triton.cdiv(WEIGHT_PROGRAMS, pieces))
    outputs, group_channels, kernel_h, kernel_w = weight.shape
    size = (shares, kernel_h, kernel_w, group_channels, outputs)
    partial = torch.empty(size, dtype=torch.float32, device=grad.device)
    _weights_kernel[(shares * pieces,)](
        grad_weight=partial,
        grad=grad,
        blocks=blocks,
        all_blocks=all_blocks,
        shares=shares,
        num_warps=warps(sizes["BLOCK_CHANNELS"], sizes["BLOCK_OUTPUTS"]),
        num_stages=2,
        **shared,
        **sizes,
    )
    return partial.sum(0).permute(3, 2, 0, 1).to(weight.dtype).contiguous()


def backward(
    grad: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`upsnet::deform_conv2d_backward`: the gradients of input, offset, weight, bias and mask (empty without a mask),
    each in the dtype of what it belongs to; sums in float32.
    """
    shared = geometry(input, offset, weight, mask, stride, padding, dilation)
    grad = grad.to(input.dtype).contiguous(memory_format=torch.channels_last)
    if grad.numel() == 0:
        grad_mask = offset.new_zeros(input.shape[0], 0, *offset.shape[2:]) if mask is None else torch.zeros_like(mask)
        grad_bias = input.new_zeros(weight.shape[0])
        return torch.zeros_like(input), torch.zeros_like(offset), torch.zeros_like(weight), grad_bias, grad_mask
    with torch.cuda.device_of(input):
        grad_input, grad_offset, grad_mask = _gradients_of_places(shared, grad, input, offset, weight, mask)
        grad_weight = _gradient_of_weight(shared, grad, weight)
    grad_bias = grad.sum((0, 2, 3), dtype=torch.float32).to(input.dtype)
    return grad_input, grad_offset, grad_weight, grad_bias, grad_mask
