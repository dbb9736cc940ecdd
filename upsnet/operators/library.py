"""Loads the native code, registers its operators with torch and decides what it covers.

The only module of the package with an effect on import: where `_native.*.so` lies beside this file (built by
`python setup.py build_ext --inplace`), its operators appear under `torch.ops.upsnet` with gradients and shape rules;
`_overlaps.*.so` is an ordinary extension module. What is missing, broken or outdated steps aside, and torchvision's
operators or numpy serve. `UPSNET_NATIVE=0` in the environment switches both off.
"""

import importlib
import importlib.machinery
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OPERATORS = ("deform_conv2d", "deform_conv2d_backward", "nms_sorted")
FLOATS = (torch.float32, torch.float64)
SWITCHED_OFF = "switched off by UPSNET_NATIVE=0"


def _find_library() -> Path | None:
    folder = Path(__file__).parent
    names = (f"_native{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _load() -> str:
    """Loads the library; the empty string, or the reason why it is not in use."""
    if os.environ.get("UPSNET_NATIVE") == "0":
        return SWITCHED_OFF
    path = _find_library()
    if path is None:
        return "not built; `python setup.py build_ext --inplace` builds it"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:  # damaged file, missing symbol; operators that torch refuses
        return f"{path.name} does not load: {str(error).splitlines()[0]}"
    missing = [name for name in OPERATORS if not hasattr(torch.ops.upsnet, name)]
    return f"{path.name} is outdated: it lacks {', '.join(missing)}; build it again" if missing else ""


def _load_counting() -> tuple[Callable[..., Any] | None, str]:
    """`count_overlaps` of lib/cython/overlaps.pyx, or the reason why it is not in use."""
    if os.environ.get("UPSNET_NATIVE") == "0":
        return None, SWITCHED_OFF
    try:
        return importlib.import_module("upsnet.operators._overlaps").count_overlaps, ""
    except ModuleNotFoundError:
        return None, "not built; `python setup.py build_ext --inplace` builds it"
    except ImportError as error:
        return None, f"_overlaps does not load: {str(error).splitlines()[0]}"


def _out_size(size: Any, kernel: Any, stride: int, padding: int, dilation: int) -> Any:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _dense_format(tensor: Tensor) -> torch.memory_format:
    channels_last = not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _deform_conv2d_shape(
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
    return input.new_empty(input.shape[0], weight.shape[0], *size).to(memory_format=_dense_format(input))


def _deform_conv2d_backward_shape(
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
        input.new_empty(input.shape).to(memory_format=_dense_format(input)),
        input.new_empty(offset.shape),
        input.new_empty(weight.shape),
        input.new_empty(weight.shape[0]),
        input.new_empty(mask_shape),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, offset, weight, bias, mask, ctx.stride, ctx.padding, ctx.dilation = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(input, offset, weight, mask)


def _deform_conv2d_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, offset, weight, mask = ctx.saved_tensors
    grad_input, grad_offset, grad_weight, grad_bias, grad_mask = torch.ops.upsnet.deform_conv2d_backward(
        grad, input, offset, weight, mask, ctx.stride, ctx.padding, ctx.dilation
    )
    optional = (grad_bias if ctx.has_bias else None, grad_mask if mask is not None else None)
    return grad_input, grad_offset, grad_weight, *optional, None, None, None


def _nms_sorted_shape(boxes: Tensor, groups: Tensor | None, threshold: float) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _register() -> None:
    torch.library.register_fake("upsnet::deform_conv2d", _deform_conv2d_shape)
    torch.library.register_fake("upsnet::deform_conv2d_backward", _deform_conv2d_backward_shape)
    torch.library.register_fake("upsnet::nms_sorted", _nms_sorted_shape)
    torch.library.register_autograd("upsnet::deform_conv2d", _deform_conv2d_gradient, setup_context=_save_for_backward)


NOT_IN_USE_BECAUSE = _load()
if not NOT_IN_USE_BECAUSE:
    _register()


count_overlaps, COUNTING_NOT_IN_USE_BECAUSE = _load_counting()


def native_in_use() -> bool:
    """Whether the native library is loaded in this process."""
    return not NOT_IN_USE_BECAUSE


def covers_deform_conv2d(input: Tensor, weight: Tensor) -> bool:
    """Whether the native library takes this call: CPU, float32 (float64 for tests), one weight group."""
    return (
        native_in_use()
        and input.device.type == weight.device.type == "cpu"
        and input.dtype in FLOATS
        and weight.shape[1] == input.shape[1]
    )


def covers_nms(boxes: Tensor) -> bool:
    """Whether the native library takes this call: CPU and float32."""
    return native_in_use() and boxes.device.type == "cpu" and boxes.dtype == torch.float32


def describe() -> str:
    """One line for the start of a run: which operators are in use, and why not the native ones."""
    if native_in_use():
        return "native operators: deform_conv2d and nms on the CPU"
    return f"native operators: not in use ({NOT_IN_USE_BECAUSE}); torchvision's serve, slower, with the same results"


def describe_counting() -> str:
    """One line: what counts the overlaps of panoptic quality, and why not the native code."""
    if count_overlaps is not None:
        return "native counting of overlaps: in use"
    return (
        f"native counting of overlaps: not in use ({COUNTING_NOT_IN_USE_BECAUSE}); numpy serves, with the same results"
    )
