"""Loads the native code and decides what it covers.

`_native.*.so` (schemas and CPU kernels) and `_native_cuda.*.so` (CUDA kernels of the same operators) are built by
`python setup.py build_ext --inplace` and lie beside this file; their operators appear under `torch.ops.upsnet`.
`_overlaps.*.so` is an ordinary extension module. Some CUDA kernels are written in Triton, which compiles them when they
are first called and wants a C compiler and Python's headers for that. What is missing, broken or outdated steps aside,
and PyTorch's operators or numpy serve. `UPSNET_NATIVE=0` in the environment switches all of it off.

Each operator's own file tells `register` its shape rule, gradient and autocast rule; nothing else here knows operators.
"""

import functools
import importlib
import importlib.machinery
import importlib.util
import logging
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upsnet.structures.errors import UserError

FLOATS = (torch.float32, torch.float64)
HALVES = (torch.float16, torch.bfloat16)
COVERED: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    "caffe_sgd_": {"cpu": (torch.float32,)},
    "deform_conv2d": {"cpu": (*FLOATS, torch.bfloat16), "triton": (torch.float32, *HALVES)},
    "deform_conv2d_backward": {"cpu": (*FLOATS, torch.bfloat16), "triton": (torch.float32, *HALVES)},
    "fuse_panoptic": {"cpu": (torch.float32,), "cuda": (torch.float32,)},
    "nms_flags": {"cpu": (torch.float32,), "cuda": (torch.float32,)},
    "paste_masks": {"cpu": (torch.float32,)},
    "pyramid_roi_align": {"cpu": (*FLOATS, torch.bfloat16), "cuda": (*FLOATS, *HALVES)},
    "pyramid_roi_align_backward": {"cpu": (*FLOATS, torch.bfloat16), "cuda": (*FLOATS, *HALVES)},
}
"""For each native operator, by kind of device, the dtypes that it takes; `triton` stands for CUDA devices where Triton
compiles. A device that is not named is not covered."""

VARIANTS = ("generic", "avx2", "avx512")
"""Of the CPU's kernels; UPSNET_NATIVE_CPU names the best that may be chosen, lib/native/cpu/variants.h chooses."""

SWITCHED_OFF = "switched off by UPSNET_NATIVE=0"
NOT_BUILT = "not built; `python setup.py build_ext --inplace` builds it"
NO_CUDA = "this torch is built without CUDA"
OLDEST_FOR_TRITON = 80
"""Compute capability 8.0: the first whose tensor cores take bfloat16 and TF32."""

logger = logging.getLogger(__name__)


def _find_library(name: str) -> Path | None:
    folder = Path(__file__).parent
    names = (f"{name}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _load(name: str, operators: tuple[str, ...]) -> str:
    """Loads a library of operators; the empty string, or the reason why it is not in use.

    Raises:
        UserError: UPSNET_NATIVE_CPU names no variant.
    """
    if os.environ.get("UPSNET_NATIVE") == "0":
        return SWITCHED_OFF
    variant = os.environ.get("UPSNET_NATIVE_CPU") or VARIANTS[-1]
    if variant not in VARIANTS:
        raise UserError(f"UPSNET_NATIVE_CPU is '{variant}': choose {', '.join(VARIANTS)}, or leave it out")
    path = _find_library(name)
    if path is None:
        return NOT_BUILT
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:  # damaged file, missing symbol; operators that torch refuses
        return f"{path.name} does not load: {str(error.__cause__ or error).splitlines()[0]}"  # torch hides the cause
    missing = [operator for operator in operators if not hasattr(torch.ops.upsnet, operator)]
    return f"{path.name} is outdated: it lacks {', '.join(missing)}; build it again" if missing else ""


def _load_cuda(cpu_is_missing_because: str) -> str:
    """The same for the CUDA kernels. They hang on the schemas of the CPU library and on torch's CUDA libraries."""
    if torch.version.cuda is None:
        return NO_CUDA
    return cpu_is_missing_because or _load("_native_cuda", ())


def _load_counting() -> tuple[Callable[..., Any] | None, str]:
    """`count_overlaps` of lib/cython/overlaps.pyx, or the reason why it is not in use."""
    if os.environ.get("UPSNET_NATIVE") == "0":
        return None, SWITCHED_OFF
    try:
        return importlib.import_module("upsnet.operators._overlaps").count_overlaps, ""
    except ModuleNotFoundError:
        return None, NOT_BUILT
    except ImportError as error:
        return None, f"_overlaps does not load: {str(error).splitlines()[0]}"


def _find_triton(cpu_is_missing_because: str) -> str:
    """The empty string if the operators in Triton can be registered; Triton itself is not imported for that."""
    if torch.version.cuda is None:
        return NO_CUDA
    return cpu_is_missing_because or ("" if importlib.util.find_spec("triton") else "triton is not installed")


@functools.cache
def triton_fails_because() -> str:
    """The reason why Triton compiles nothing for the GPU at hand, or the empty string; found out once, and logged.

    Triton first compiles its own access to the driver, with the machine's C compiler and Python's headers. So asking
    for the device shows what would fail in a kernel's first call.
    """
    from triton.runtime import driver

    try:
        target = driver.active.get_current_target()
    except subprocess.SubprocessError:
        reason = "Triton does not compile here: the C compiler fails; are Python's headers installed?"
    except (RuntimeError, OSError, ImportError, AssertionError) as error:  # no compiler, driver or place for its files
        reason = f"Triton does not compile here: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    else:
        old = target.backend != "cuda" or target.arch < OLDEST_FOR_TRITON
        reason = f"Triton's kernels want compute capability 8.0, this GPU is {target.arch}" if old else ""
    if reason:
        logger.warning("deformable convolution on CUDA: torchvision's operator serves (%s)", reason)
    return reason


NOT_IN_USE_BECAUSE = _load("_native", tuple(COVERED))
CUDA_NOT_IN_USE_BECAUSE = _load_cuda(NOT_IN_USE_BECAUSE)
TRITON_NOT_IN_USE_BECAUSE = _find_triton(NOT_IN_USE_BECAUSE)
count_overlaps, COUNTING_NOT_IN_USE_BECAUSE = _load_counting()


def native_in_use() -> bool:
    """Whether the native library of the CPU is loaded in this process."""
    return not NOT_IN_USE_BECAUSE


def native_cuda_in_use() -> bool:
    """Whether the CUDA kernels are loaded in this process."""
    return not CUDA_NOT_IN_USE_BECAUSE


@torch.compiler.assume_constant_result
def triton_in_use() -> bool:
    """Whether kernels in Triton serve the CUDA device at hand; `torch.compile` asks and keeps the answer."""
    return not TRITON_NOT_IN_USE_BECAUSE and not triton_fails_because()


def register(
    operator: str,
    shape: Callable[..., Any],
    gradient: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    autocast: Callable[..., tuple[Any, ...]] | None = None,
    triton: Callable[..., Any] | None = None,
) -> None:
    """Completes a native operator for torch; without the library it does nothing.

    Args:
        operator: its name under `torch.ops.upsnet`.
        shape: the rule for fake tensors: the operator's arguments → empty results.
        gradient, setup_context: as `torch.library.register_autograd` takes them.
        autocast: (dtype of autocast, the operator's arguments) → the arguments that it is called with under autocast.
        triton: the CUDA implementation, if it is one in Triton.
    """
    if not native_in_use():
        return
    torch.library.register_fake(f"upsnet::{operator}", shape)
    if gradient is not None:
        torch.library.register_autograd(f"upsnet::{operator}", gradient, setup_context=setup_context)
    if autocast is not None:
        for device in ("cpu", "cuda"):
            torch.library.impl(f"upsnet::{operator}", f"Autocast{device.upper()}")(_cast(operator, device, autocast))
    if triton is not None and not TRITON_NOT_IN_USE_BECAUSE:
        torch.library.impl(f"upsnet::{operator}", "CUDA")(triton)


def differentiated_once(ctx: Any, *gradients: Tensor) -> None:
    """The gradient of an operator that is a gradient itself. Without it torch warns, and gives zeros."""
    raise NotImplementedError("a native operator cannot be differentiated twice, as torchvision's cannot")


def _cast(operator: str, device: str, autocast: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        cast = autocast(torch.get_autocast_dtype(device), *arguments)
        with torch.autocast(device, enabled=False):
            return getattr(torch.ops.upsnet, operator)(*cast)

    return call


def covers(operator: str, *tensors: Tensor) -> bool:
    """Whether the native code takes this call: all tensors on one covered device, in covered dtypes."""
    device, row = tensors[0].device.type, COVERED[operator]
    if device == "cuda" and "triton" in row:
        in_use, types = triton_in_use(), row["triton"]
    else:
        in_use, types = native_cuda_in_use() if device == "cuda" else native_in_use(), row.get(device, ())
    return in_use and all(tensor.device.type == device and tensor.dtype in types for tensor in tensors)


def describe() -> str:
    """One line for the start of a run: which operators are in use, and why not the native ones."""
    if not native_in_use():
        return f"native operators: not in use ({NOT_IN_USE_BECAUSE}); PyTorch's serve, slower, with the same results"
    with_gpu = "in use" if torch.cuda.is_available() else "loaded, no GPU here"
    on_cuda, in_triton = (
        f"not in use ({reason})" if reason else with_gpu
        for reason in (CUDA_NOT_IN_USE_BECAUSE, TRITON_NOT_IN_USE_BECAUSE)
    )
    there = "" if on_cuda == in_triton else f"; those in Triton {in_triton}"
    return f"native operators: in use on the CPU; on CUDA {on_cuda}{there}"


def describe_counting() -> str:
    """One line: what counts the overlaps of panoptic quality, and why not the native code."""
    if count_overlaps is not None:
        return "native counting of overlaps: in use"
    return (
        f"native counting of overlaps: not in use ({COUNTING_NOT_IN_USE_BECAUSE}); numpy serves, with the same results"
    )
