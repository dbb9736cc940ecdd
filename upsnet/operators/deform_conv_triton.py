"""Deformable convolution on the GPU in Triton: the forward pass, and what both passes share.

One program computes a block of output pixels × outputs. For every tap it finds the sampling places of its pixels once,
gathers the four neighbours' channel vectors (the input is channels-last, so a vector is one run of memory), mixes them
in float32 and multiplies the samples by the tap's weights on the tensor cores. Samples never leave the program.

`deform_conv.py` registers `forward` here, and `backward` of deform_conv_triton_backward.py, as the CUDA kernels of its
operators. With TRITON_INTERPRET=1 in the environment both run on CPU tensors, slowly: so the tests see their values.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from upsnet.operators.images import empty_images, is_channels_last

ENOUGH_PROGRAMS = 132
"""One for each multiprocessor of a large GPU; problems that would give fewer are cut into smaller blocks."""

SIZES = ["height", "width", "out_width", "out_pixels", "blocks", "all_blocks", "shares"]
"""Arguments that change with the photo. Triton would compile anew for those that 16 divides, in any combination."""


@triton.jit
def element(
    image: tl.tensor,
    channel: tl.tensor,
    pixel: tl.tensor,
    CHANNELS: tl.constexpr,
    pixels: tl.tensor,
    CHANNELS_LAST: tl.constexpr,
) -> tl.tensor:
    """Index of an element in a dense batch of either layout; 64 bits wide because `image` is."""
    if CHANNELS_LAST:
        return (image * pixels + pixel) * CHANNELS + channel
    return (image * CHANNELS + channel) * pixels + pixel


@triton.jit
def locate(
    offset: tl.tensor, mask: tl.tensor, image: tl.tensor, pixel: tl.tensor, group: tl.tensor, tap: tl.tensor,
    height: tl.tensor, width: tl.tensor, out_width: tl.tensor, out_pixels: tl.tensor,
    TAPS: tl.constexpr, KERNEL_W: tl.constexpr, OFFSET_GROUPS: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, OFFSET_LAST: tl.constexpr, MASK_LAST: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Where one tap of each pixel samples: row and column of the upper left neighbour, the fractions beyond it, whether
    the place counts, what a place that does not count is worth, and the factor from the mask.

    The condition is closed at -1, as in lib/native/cpu/deform_kernels.h: the derivative towards the inside is wanted.
    """
    is_pixel = pixel < out_pixels
    channel = group * TAPS + tap
    dy = element(image, 2 * channel, pixel, 2 * OFFSET_GROUPS * TAPS, out_pixels, OFFSET_LAST)
    dx = element(image, 2 * channel + 1, pixel, 2 * OFFSET_GROUPS * TAPS, out_pixels, OFFSET_LAST)
    tap_y = tap // KERNEL_W * DILATION_H - PAD_H
    tap_x = tap % KERNEL_W * DILATION_W - PAD_W
    y = (pixel // out_width * STRIDE_H + tap_y).to(tl.float32) + tl.load(offset + dy, is_pixel, 0.0).to(tl.float32)
    x = (pixel % out_width * STRIDE_W + tap_x).to(tl.float32) + tl.load(offset + dx, is_pixel, 0.0).to(tl.float32)
    counts = is_pixel & (y >= -1) & (y < height) & (x >= -1) & (x < width)
    outside = tl.where((y != y) | (x != x), y + x, 0.0)  # a NaN offset must stay visible in the result
    y = tl.where(counts, y, 0.0)
    x = tl.where(counts, x, 0.0)
    top = tl.floor(y)
    left = tl.floor(x)
    factor = tl.full(pixel.shape, 1.0, tl.float32)
    if mask is not None:
        at = element(image, channel, pixel, OFFSET_GROUPS * TAPS, out_pixels, MASK_LAST)
        factor = tl.load(mask + at, is_pixel, 0.0).to(tl.float32)
    return top.to(tl.int32), left.to(tl.int32), y - top, x - left, counts, outside, factor


@triton.jit
def corner(
    place: tl.tuple,
    image: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    CHANNELS: tl.constexpr,
    down: tl.tensor,
    right: tl.tensor,
) -> tl.tuple:
    """One neighbour of each place, (0, 0) the upper left: index of its first channel, whether it is there, and its
    bilinear weight."""
    top, left, fraction_y, fraction_x, counts, outside, _ = place
    row = top + down
    column = left + right
    weight_y = tl.where(down == 1, fraction_y, 1 - fraction_y)
    weight_x = tl.where(right == 1, fraction_x, 1 - fraction_x)
    is_there = counts & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    first = (image * height * width + (row * width + column)) * CHANNELS
    return first, is_there, tl.where(counts, weight_y * weight_x, outside)


@triton.jit
def gather(input: tl.tensor, neighbour: tl.tuple, channel: tl.tensor, is_channel: tl.tensor) -> tl.tensor:
    """Channel vectors of one neighbour of each place, [pixel, channel] in float32; zeros where it is not there."""
    first, is_there, _ = neighbour
    # A pointer for each row, 32-bit steps along it: the wide arithmetic stays out of the large tile.
    rows = input + first
    wanted = is_there[:, None] & is_channel[None, :]
    return tl.load(rows[:, None] + channel[None, :], mask=wanted, other=0.0).to(tl.float32)


@triton.jit
def sample(
    input: tl.tensor,
    place: tl.tuple,
    image: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    CHANNELS: tl.constexpr,
    channel: tl.tensor,
    is_channel: tl.tensor,
) -> tl.tensor:
    """Bilinear samples times the mask's factor, [pixel, channel] in float32."""
    total = tl.zeros((channel.shape[0],), tl.float32)[None, :]
    for neighbour in tl.static_range(4):
        found = corner(place, image, height, width, CHANNELS, neighbour // 2, neighbour % 2)
        total += (found[2] * place[6])[:, None] * gather(input, found, channel, is_channel)
    return total


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    output: tl.tensor, bias: tl.tensor, weight: tl.tensor, input: tl.tensor, offset: tl.tensor, mask: tl.tensor,
    height: tl.tensor, width: tl.tensor, out_width: tl.tensor, out_pixels: tl.tensor, blocks: tl.tensor,
    CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, WEIGHT_GROUPS: tl.constexpr, OFFSET_GROUPS: tl.constexpr,
    SPAN: tl.constexpr, TAPS: tl.constexpr, KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, OFFSET_LAST: tl.constexpr, MASK_LAST: tl.constexpr,
    PRECISION: tl.constexpr, OUTPUT_LAST: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    GROUP_CHANNELS: tl.constexpr = CHANNELS // WEIGHT_GROUPS
    GROUP_OUTPUTS: tl.constexpr = OUTPUTS // WEIGHT_GROUPS
    OUTPUT_BLOCKS: tl.constexpr = (GROUP_OUTPUTS + BLOCK_OUTPUTS - 1) // BLOCK_OUTPUTS
    program = tl.program_id(0)  # programs that share pixels follow each other: they find the input in the cache
    weight_group = program % (WEIGHT_GROUPS * OUTPUT_BLOCKS) // OUTPUT_BLOCKS
    local_output = program % OUTPUT_BLOCKS * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    is_output = local_output < GROUP_OUTPUTS
    output_channel = weight_group * GROUP_OUTPUTS + local_output
    block = program // (WEIGHT_GROUPS * OUTPUT_BLOCKS)
    image = (block // blocks).to(tl.int64)
    pixel = block % blocks * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)

    total = tl.zeros((BLOCK_PIXELS, BLOCK_OUTPUTS), tl.float32)
    for step in range(GROUP_CHANNELS // SPAN * TAPS):
        tap = step % TAPS
        first = weight_group * GROUP_CHANNELS + step // TAPS * SPAN
        group = first // (CHANNELS // OFFSET_GROUPS)
        place = locate(
            offset, mask, image, pixel, group, tap, height, width, out_width, out_pixels, TAPS, KERNEL_W, OFFSET_GROUPS,
            STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W, OFFSET_LAST, MASK_LAST,
        )  # fmt: skip
        for begin in range(0, SPAN, BLOCK_CHANNELS):
            channel = begin + tl.arange(0, BLOCK_CHANNELS)
            is_channel = channel < SPAN
            channel += first
            samples = sample(input, place, image, height, width, CHANNELS, channel, is_channel)
            at = (tap * GROUP_CHANNELS + channel - weight_group * GROUP_CHANNELS)[:, None] * OUTPUTS + output_channel[
                None, :
            ]
            weights = tl.load(weight + at, mask=is_channel[:, None] & is_output[None, :], other=0.0)
            total = tl.dot(samples.to(weights.dtype), weights, total, input_precision=PRECISION)

    if bias is not None:
        total += tl.load(bias + output_channel, mask=is_output, other=0.0).to(tl.float32)[None, :]
    at = element(image, output_channel[None, :], pixel[:, None], OUTPUTS, out_pixels, OUTPUT_LAST)
    wanted = (pixel < out_pixels)[:, None] & is_output[None, :]
    tl.store(output + at, total.to(output.dtype.element_ty), mask=wanted)


def dense(tensor: Tensor) -> Tensor:
    """The batch in one of the two layouts."""
    return tensor if is_channels_last(tensor) else tensor.contiguous()


def precision(dtype: torch.dtype) -> str:
    """How Triton multiplies: PyTorch's own switch for float32 matrix products, `torch.backends.cuda.matmul`."""
    exact = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "ieee" if exact else "tf32"


def geometry(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> dict[str, Any]:
    """The arguments that all kernels share. `input` comes back channels-last.

    SPAN: channels in a row that share offset group and weight group; blocks of channels never cross its ends.
    """
    _, channels, height, width = input.shape
    outputs, group_channels, kernel_h, kernel_w = weight.shape
    taps = kernel_h * kernel_w
    offset_groups = offset.shape[1] // (2 * taps)
    return {
        "input": input.contiguous(memory_format=torch.channels_last),
        "offset": dense(offset),
        "mask": None if mask is None else dense(mask),
        "height": height,
        "width": width,
        "out_width": offset.shape[3],
        "out_pixels": offset.shape[2] * offset.shape[3],
        "CHANNELS": channels,
        "OUTPUTS": outputs,
        "WEIGHT_GROUPS": channels // group_channels,
        "OFFSET_GROUPS": offset_groups,
        "SPAN": math.gcd(group_channels, channels // offset_groups),
        "TAPS": taps,
        "KERNEL_W": kernel_w,
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "PAD_H": padding[0],
        "PAD_W": padding[1],
        "DILATION_H": dilation[0],
        "DILATION_W": dilation[1],
        "OFFSET_LAST": is_channels_last(offset),
        "MASK_LAST": mask is not None and is_channels_last(mask),
        "PRECISION": precision(input.dtype),
    }


def block_size(length: int, most: int) -> int:
    """The power of two that holds `length`, from 16 (the least that tensor cores take) to `most`."""
    return min(most, max(16, triton.next_power_of_2(length)))


def warps(rows: int, columns: int) -> int:
    """Warps for a tile of sums: 64 registers of each thread hold them, beside what gathering needs."""
    return min(16, max(4, rows * columns // 2048))


def _blocks(shared: dict[str, Any], images: int, dtype: torch.dtype) -> dict[str, int]:
    """Block sizes. Every block of outputs gathers its pixels' samples again, every block of pixels reads all weights.

    So both are as large as registers and 99 KiB of shared memory (GPUs of 8.6 and 8.9) allow, as seen in the code that
    Triton makes for 8.0 and 9.0. Chosen by that and by counting bytes: nothing was measured on a GPU.
    """
    exact = shared["PRECISION"] == "ieee"
    group_outputs = shared["OUTPUTS"] // shared["WEIGHT_GROUPS"]
    most = (128, 256) if dtype != torch.float32 else (64, 64) if exact else (128, 128)
    pixels, outputs = block_size(shared["out_pixels"], most[0]), block_size(group_outputs, most[1])

    def programs() -> int:
        per_image = triton.cdiv(shared["out_pixels"], pixels) * triton.cdiv(group_outputs, outputs)
        return images * per_image * shared["WEIGHT_GROUPS"]

    while programs() < ENOUGH_PROGRAMS and pixels * outputs > 32 * 64:
        if outputs > pixels:
            outputs //= 2
        else:
            pixels //= 2
    return {
        "BLOCK_PIXELS": pixels,
        "BLOCK_OUTPUTS": outputs,
        "BLOCK_CHANNELS": block_size(shared["SPAN"], 32 if dtype != torch.float32 else 16),
        "num_warps": warps(pixels, outputs),
        "num_stages": 2,
    }


def forward(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """`upsnet::deform_conv2d` for float32, bfloat16 and float16 input; the other tensors may have any of these dtypes.

    Products are formed in the input's dtype (float32: exactly, or in TF32 where PyTorch's switch allows it), samples
    and sums in float32.
    """
    shared = geometry(input, offset, weight, mask, stride, padding, dilation)
    images, outputs = input.shape[0], weight.shape[0]
    output = empty_images(input, (images, outputs, *offset.shape[2:]))
    if output.numel() == 0:
        return output
    sizes = _blocks(shared, images, input.dtype)
    blocks = triton.cdiv(shared["out_pixels"], sizes["BLOCK_PIXELS"])
    output_blocks = triton.cdiv(outputs // shared["WEIGHT_GROUPS"], sizes["BLOCK_OUTPUTS"])
    with torch.cuda.device_of(input):
        _forward_kernel[(images * blocks * output_blocks * shared["WEIGHT_GROUPS"],)](
            output=output,
            bias=None if bias is None else bias.contiguous(),
            weight=weight.permute(2, 3, 1, 0).to(input.dtype).contiguous(),  # [tap, channel, output]
            blocks=blocks,
            OUTPUT_LAST=is_channels_last(output),
            **shared,
            **sizes,
        )
    return output
