"""Deformable convolution in Triton: its values through Triton's interpreter, its code for GPUs, and the way aside.

The interpreter wants TRITON_INTERPRET=1 before Triton is imported and runs on CPU tensors. So the kernels run in a
process of their own, and no other test sees that mode.
"""

import importlib
import logging
import multiprocessing
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision

from tests.operators.test_deform_conv import BIG_SHAPES, FORMATS, SHAPES, assert_all_close, make_case, spread
from tests.reference.deform_conv import deform_conv2d as twin
from upsnet.operators import deform_conv2d, library

triton = pytest.importorskip("triton", reason="triton is not installed")

# As SHAPES; few steps of the slow interpreter, and more channels, pixels or outputs than a block holds.
SMALL = (2, 6, 3, 4, 5, (2, 1), (1, 1), (1, 0), (1, 1), 2, True)
STRIDED = (1, 6, 5, 4, 5, (3, 2), (2, 1), (1, 2), (1, 2), 2, True)
TALL = (1, 40, 3, 50, 70, (1, 2), (1, 1), (0, 1), (1, 1), 2, True)
WIDE = (2, 3, 2, 3, 300, (1, 1), (1, 1), (0, 0), (1, 1), 1, False)
NAMES = ("input", "offset", "weight", "bias", "mask")


@pytest.fixture(scope="module")
def interpreted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), mend_interpreter) as pool:
            came_early = pool.submit(kernels_are_imported).result()  # starts the process
            patch.undo()
            yield SimpleNamespace(
                run=lambda *case: pool.submit(run_kernels, *case).result(), kernels_came_with_the_package=came_early
            )


def kernels_are_imported():
    return "upsnet.operators" in sys.modules and "upsnet.operators.deform_conv_triton" in sys.modules


def mend_interpreter():
    """It multiplies matrices of bfloat16 as the integers that it keeps them in; and that of Triton 3.6 takes no number
    from an array of one element, which numpy allowed until 2.4."""
    from triton.runtime import interpreter

    dot, patch = interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang_tensor

    def widened(handle):
        if handle.dtype.scalar != triton.language.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), triton.language.float32)

    def create_dot(self, a, b, *others):
        return dot(self, widened(a), widened(b), *others)

    def patch_with_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang_tensor = create_dot, patch_with_index


def run_kernels(arguments, options, grad):
    """In the process with the interpreter: the output, and gradients by name if there is one of the output."""
    from upsnet.operators.deform_conv_triton import forward
    from upsnet.operators.deform_conv_triton_backward import backward

    np.seterr(invalid="ignore")  # damaged offsets
    input, offset, weight, bias, mask = arguments.values()
    output = forward(input, offset, weight, bias, mask, *options.values())
    if grad is None:
        return output, {}
    grads = backward(grad, input, offset, weight, mask, *options.values())
    return output, dict(zip(NAMES, grads, strict=True))


def expected_of(arguments, options, grad):
    """torchvision's, in the given precision."""
    leaves = {name: None if t is None else t.detach().clone().requires_grad_() for name, t in arguments.items()}
    output = torchvision.ops.deform_conv2d(**leaves, **options)
    output.backward(grad)
    return output.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf is not None}


def gradient_for(arguments, options):
    output = torchvision.ops.deform_conv2d(**arguments, **options)
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)


def assert_agree(found, expected, tolerance=1e-5):
    assert_all_close([found[0]], [expected[0]], tolerance)
    for name, grad in expected[1].items():
        assert_all_close([found[1][name]], [grad], tolerance)


@pytest.mark.parametrize("kind", ["random", "integers", "zero", "far", "huge", "halves"])
@pytest.mark.parametrize("shape", SHAPES[2:4])
def test_equals_the_loops(shape, kind, interpreted):
    arguments, options = make_case(shape, kind)
    expected = twin(**{k: None if t is None else t.double().numpy() for k, t in arguments.items()}, **options)
    ours, _ = interpreted.run(arguments, options, None)
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        (STRIDED, "random"),
        (STRIDED, "integers"),
        (SHAPES[3], "far"),
        (SHAPES[4], "random"),
        (SHAPES[4], "halves"),
        (TALL, "random"),
        (WIDE, "random"),
    ],
)
def test_values_and_gradients_are_torchvisions(shape, kind, interpreted):
    arguments, options = make_case(shape, kind)
    grad = gradient_for(arguments, options)
    assert_agree(interpreted.run(arguments, options, grad), expected_of(arguments, options, grad))


@pytest.mark.parametrize(("weight_groups", "offset_groups"), [(2, 1), (2, 4), (4, 2), (2, 2)])
def test_weight_groups(weight_groups, offset_groups, interpreted):
    arguments, options = make_case((1, 8, 2, 3, 12, (1, 2), (1, 1), (0, 1), (1, 1), offset_groups, True))
    arguments["weight"] = arguments["weight"][:, : 8 // weight_groups].contiguous()
    grad = gradient_for(arguments, options)
    assert_agree(interpreted.run(arguments, options, grad), expected_of(arguments, options, grad))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, interpreted):
    """Places stay float32, as the face hands them; products are rounded, sums are not."""
    arguments, options = make_case(SMALL)
    grad = gradient_for(arguments, options).to(dtype)
    halves = {name: t if name in ("offset", "mask") else t.to(dtype) for name, t in arguments.items()}
    output, grads = interpreted.run(halves, options, grad)
    expected = expected_of({name: t.float() for name, t in halves.items()}, options, grad.float())
    assert output.dtype == dtype
    assert all(grads[name].dtype == halves[name].dtype for name in NAMES)
    found = output.float(), {name: t.float() for name, t in grads.items()}
    assert_agree(found, expected, 2e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_layouts_and_views(memory_format, interpreted):
    arguments, options = make_case(SMALL)
    grad = gradient_for(arguments, options)
    expected = expected_of(arguments, options, grad)
    formed = {n: t.contiguous(memory_format=memory_format) if t.dim() == 4 else t for n, t in arguments.items()}
    found = interpreted.run(formed, options, grad.contiguous(memory_format=memory_format))
    assert_agree(found, expected)
    for tensor in (found[0], found[1]["input"]):
        assert tensor.is_contiguous(memory_format=memory_format)
    views = {name: spread(t, memory_format) for name, t in arguments.items()}
    assert_agree(interpreted.run(views, options, spread(grad, memory_format)), expected)


@pytest.mark.parametrize("with_mask", [False, True])
def test_empty_batch(with_mask, interpreted):
    arguments, options = make_case((*SHAPES[0][:-1], with_mask))
    empty = {
        name: t[:0] if name in ("input", "offset", "mask") and t is not None else t for name, t in arguments.items()
    }
    output, grads = interpreted.run(empty, options, torch.zeros(0, 3, 5, 6))
    assert output.shape == (0, 3, 5, 6)
    for name, tensor in empty.items():
        assert tensor is None or (grads[name].shape == tensor.shape and (grads[name] == 0).all())


def test_damaged_offsets_stay_visible(interpreted):
    arguments, options = make_case(SHAPES[0])
    arguments["offset"][0, 0, 2, 2] = float("nan")
    bad = interpreted.run(arguments, options, None)[0].isnan()
    assert bad[0, :, 2, 2].all() and bad.sum() == 3


def test_shapes_are_those_of_the_rules(interpreted):
    """What torch is told about the operators on fake tensors is what the kernels return."""
    arguments, options = make_case(SMALL)
    arguments["input"] = arguments["input"].contiguous(memory_format=torch.channels_last)
    grad = gradient_for(arguments, options)
    output, grads = interpreted.run(arguments, options, grad)
    rules = importlib.import_module("upsnet.operators.deform_conv")
    plain = {name: arguments[name] for name in NAMES if name != "bias"}
    promised = rules._shape_of_gradients(grad, *plain.values(), *options.values())
    for ours, theirs in [
        (output, rules._shape(*(arguments[name] for name in NAMES), *options.values())),
        *zip(grads.values(), promised, strict=True),
    ]:
        assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


# -- code for GPUs, without one ----------------------------------------------------------------------------------------


class Recorder:
    """Stands for a kernel: keeps the arguments of its launch."""

    def __init__(self, kernel):
        self.kernel, self.arguments = kernel, {}

    def __getitem__(self, grid):
        assert len(grid) == 1 and grid[0] > 0
        return self.arguments.update


def launches(arguments, options, grad, monkeypatch):
    """What the two passes would launch: (kernel, arguments)."""
    recorders = []
    for file, name in KERNELS:
        module = importlib.import_module(f"upsnet.operators.{file}")
        recorders.append(Recorder(getattr(module, name)))
        monkeypatch.setattr(module, name, recorders[-1])
    run_kernels(arguments, options, grad)
    return [(recorder.kernel, recorder.arguments) for recorder in recorders]


KERNELS = (
    ("deform_conv_triton", "_forward_kernel"),
    ("deform_conv_triton_backward", "_places_kernel"),
    ("deform_conv_triton_backward", "_weights_kernel"),
)
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}


def compiled(kernel, arguments, architecture):
    signature, constants, aligned = {}, {}, {}
    for number, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(number,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], aligned[(number,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            assert parameter.do_not_specialize, "photos of another size would be compiled for"
            signature[parameter.name] = "i32"
    return triton.compile(
        triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=importlib.import_module("triton.backends.compiler").GPUTarget("cuda", architecture, 32),
        options={name: arguments[name] for name in ("num_warps", "num_stages")},
    )


@pytest.mark.parametrize(
    ("architecture", "dtype", "tf32", "instruction"),
    [
        (90, torch.bfloat16, False, r"wgmma.mma_async.*f32.bf16.bf16"),
        (80, torch.bfloat16, False, r"mma.sync.*f32.bf16.bf16.f32"),
        (90, torch.float32, True, r"wgmma.mma_async.*f32.tf32.tf32"),
        (80, torch.float32, True, r"mma.sync.*f32.tf32.tf32.f32"),
        (90, torch.float32, False, None),
    ],
)
def test_compiles_to_tensor_cores(architecture, dtype, tf32, instruction, monkeypatch, tmp_path):
    """From the launches of a layer of the semantic head, at fewer pixels: blocks are as large as they get."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    host = importlib.import_module("upsnet.operators.deform_conv_triton")
    monkeypatch.setattr(host, "precision", lambda dtype: "tf32" if tf32 else "ieee")
    monkeypatch.setattr(host, "ENOUGH_PROGRAMS", 1)
    arguments, options = make_case((1, 256, 12, 12, 256, (3, 3), (1, 1), (1, 1), (1, 1), 1, True))
    arguments = {name: t if name in ("offset", "mask") else t.to(dtype) for name, t in arguments.items()}
    for kernel, launch in launches(arguments, options, torch.ones(1, 256, 12, 12, dtype=dtype), monkeypatch):
        code = compiled(kernel, launch, architecture)
        found = re.findall(r"^.*mma.*sync.*$", code.asm["ptx"], re.MULTILINE)
        assert bool(found) == (instruction is not None), kernel.__name__
        assert instruction is None or any(re.search(instruction, line) for line in found), found[0]
        assert code.metadata.shared <= 99 * 1024, "GPUs of 8.6 and 8.9 have no more shared memory"


def test_precision_follows_the_switch_of_torch():
    host = importlib.import_module("upsnet.operators.deform_conv_triton")
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    try:
        answers = []
        for value in ("ieee", "tf32"):
            switch.fp32_precision = value
            answers.append(host.precision(torch.float32))
    finally:
        switch.fp32_precision = before
    assert answers == ["ieee", "tf32"] and host.precision(torch.float32) == "ieee"


# -- where Triton serves, and the way aside ----------------------------------------------------------------------------


def test_kernels_are_imported_at_the_first_call_only(interpreted):
    assert not interpreted.kernels_came_with_the_package


@pytest.mark.skipif(bool(library.TRITON_NOT_IN_USE_BECAUSE), reason=library.TRITON_NOT_IN_USE_BECAUSE)
def test_is_the_cuda_implementation_of_both_operators():
    for operator in ("deform_conv2d", "deform_conv2d_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"upsnet::{operator}", "CUDA")


@pytest.mark.parametrize(
    ("outcome", "word"),
    [
        (RuntimeError("Failed to find C compiler."), "C compiler"),
        (subprocess.CalledProcessError(1, ["gcc", "main.c"]), "headers"),
        (FileNotFoundError(2, "No such file", "cc"), "No such file"),
        (AssertionError("libcuda.so cannot found!\nPlease make sure"), "libcuda.so cannot found!"),
        (AssertionError(), "AssertionError"),
        (SimpleNamespace(backend="cuda", arch=75), "8.0"),
        (SimpleNamespace(backend="hip", arch="gfx942"), "gfx942"),
        (SimpleNamespace(backend="cuda", arch=90), ""),
    ],
)
def test_where_triton_does_not_compile_torchvision_serves(outcome, word, monkeypatch, caplog):
    def target():
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    active = SimpleNamespace(get_current_target=target)
    monkeypatch.setitem(sys.modules, "triton.runtime", SimpleNamespace(driver=SimpleNamespace(active=active)))
    monkeypatch.setattr(library, "TRITON_NOT_IN_USE_BECAUSE", "")
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    library.triton_fails_because.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            answers = [library.covers("deform_conv2d", on_gpu, on_gpu) for _ in range(3)]
    finally:
        library.triton_fails_because.cache_clear()
    assert answers == [not word] * 3
    assert len(caplog.messages) == bool(word) and all(word in message for message in caplog.messages)


def test_reasons_known_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert library._find_triton("") == "" and library._find_triton("not built") == "not built"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert library._find_triton("") == "triton is not installed"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert library._find_triton("") == library.NO_CUDA
    monkeypatch.setattr(library, "NOT_IN_USE_BECAUSE", "")
    monkeypatch.setattr(library, "CUDA_NOT_IN_USE_BECAUSE", "")
    monkeypatch.setattr(library, "TRITON_NOT_IN_USE_BECAUSE", "a reason")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "on CUDA in use; those in Triton not in use (a reason)" in library.describe()
    monkeypatch.setattr(library, "TRITON_NOT_IN_USE_BECAUSE", "")
    assert library.describe().endswith("on CUDA in use")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert library.describe().endswith("on CUDA loaded, no GPU here")


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test))


def through_the_face(arguments, options, device, dtype=torch.float32):
    """Output and gradients on the CPU; places stay float32."""
    moved = {
        name: None if t is None else t.detach().to(device, torch.float32 if name in ("offset", "mask") else dtype)
        for name, t in arguments.items()
    }
    leaves = {name: None if t is None else t.requires_grad_() for name, t in moved.items()}
    output = deform_conv2d(**leaves, **options)
    output.backward(gradient_for(arguments, options).to(device, dtype))
    return [output.detach().float().cpu(), *(t.grad.float().cpu() for t in leaves.values() if t is not None)]


def served_by_triton():
    assert library.triton_in_use(), library.TRITON_NOT_IN_USE_BECAUSE or library.triton_fails_because()


@on_gpu
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("kind", ["random", "integers", "far"])
@pytest.mark.parametrize("shape", [*SHAPES, *BIG_SHAPES, TALL, WIDE])
def test_gpu_gives_what_the_cpu_gives(shape, kind, memory_format):
    served_by_triton()
    arguments, options = make_case(shape, kind)
    arguments["input"] = arguments["input"].contiguous(memory_format=memory_format)
    found = through_the_face(arguments, options, "cuda")
    assert_all_close(found, through_the_face(arguments, options, "cpu"), 1e-4)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [SHAPES[1], *BIG_SHAPES])
def test_gpu_in_half_precision(shape, dtype):
    served_by_triton()
    arguments, options = make_case(shape)
    arguments = {
        name: t if name in ("offset", "mask") or t is None else t.to(dtype).float() for name, t in arguments.items()
    }
    found = through_the_face(arguments, options, "cuda", dtype)
    assert_all_close(found, through_the_face(arguments, options, "cpu"), 2e-2 if dtype == torch.bfloat16 else 4e-3)


@on_gpu
@pytest.mark.parametrize("weight_groups", [2, 8])
def test_gpu_weight_groups(weight_groups):
    served_by_triton()
    arguments, options = make_case((2, 64, 17, 19, 96, (3, 3), (1, 1), (1, 1), (1, 1), 4, True))
    arguments["weight"] = arguments["weight"][:, : 64 // weight_groups].contiguous()
    found = through_the_face(arguments, options, "cuda")
    assert_all_close(found, through_the_face(arguments, options, "cpu"), 1e-4)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_at_the_size_of_the_network(dtype):
    """Against torchvision's operator on the GPU, in float32."""
    served_by_triton()
    arguments, options = make_case((1, 256, 200, 304, 256, (3, 3), (1, 1), (1, 1), (1, 1), 1, False))
    arguments = {name: None if t is None else t.cuda() for name, t in arguments.items()}
    arguments = {n: t if n == "offset" or t is None else t.to(dtype).float() for n, t in arguments.items()}
    arguments["input"] = arguments["input"].contiguous(memory_format=torch.channels_last)
    found = through_the_face(arguments, options, "cuda", dtype)
    expected = expected_of(arguments, options, gradient_for(arguments, options).cuda())
    expected = [t.cpu() for t in (expected[0], *expected[1].values())]
    assert_all_close(found, expected, 1e-4 if dtype == torch.float32 else 2e-2)


@on_gpu
def test_gpu_repeats_all_gradients_but_the_inputs():
    served_by_triton()
    arguments, options = make_case(BIG_SHAPES[2])
    first, second = (through_the_face(arguments, options, "cuda") for _ in range(2))
    same = [torch.equal(a, b) for a, b in zip(first, second, strict=True)]
    assert same[0] and all(same[2:])


@on_gpu
@pytest.mark.parametrize("memory_format", FORMATS)
def test_gpu_operator_checks_of_torch(memory_format):
    served_by_triton()
    arguments, options = make_case(SHAPES[1])
    arguments["input"] = arguments["input"].contiguous(memory_format=memory_format)
    leaves = [t.cuda().requires_grad_() for t in arguments.values()]
    torch.library.opcheck(torch.ops.upsnet.deform_conv2d.default, (*leaves, *options.values()))


@on_gpu
def test_gpu_autocast():
    served_by_triton()
    arguments, options = make_case(SHAPES[1])
    moved = {name: t.cuda() for name, t in arguments.items()}
    with torch.autocast("cuda", torch.bfloat16):
        output = deform_conv2d(**moved, **options)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float().cpu(), deform_conv2d(**arguments, **options), rtol=0.02, atol=0.1)
