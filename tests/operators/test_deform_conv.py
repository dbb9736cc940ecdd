"""Deformable convolution: against the loops and torchvision; promises about threads, layouts and errors."""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from tests.reference.deform_conv import deform_conv2d as twin
from upsnet.operators import deform_conv2d, library

needs_native = pytest.mark.skipif(not library.native_in_use(), reason=library.NOT_IN_USE_BECAUSE)
FORMATS = (torch.contiguous_format, torch.channels_last)
VARIANTS = ("generic", "avx2", "avx512")

# images, channels, height, width, outputs, kernel, stride, padding, dilation, offset groups, mask[, weight groups]
SHAPES = [
    (1, 4, 5, 6, 3, (3, 3), (1, 1), (1, 1), (1, 1), 1, False),
    (2, 6, 7, 5, 6, (3, 3), (2, 1), (1, 2), (1, 2), 2, True, 3),
    (1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1, False),
    (3, 2, 1, 4, 7, (1, 3), (1, 1), (0, 1), (1, 1), 1, True),
    (2, 3, 4, 3, 2, (2, 2), (1, 2), (0, 1), (2, 1), 3, False),
    (1, 6, 4, 3, 4, (3, 1), (1, 1), (1, 0), (1, 1), 3, True, 2),
    (1, 2, 1, 20, 3, (1, 1), (1, 1), (0, 0), (1, 1), 1, True),  # a row that is longer than the smallest tile
]
BIG_SHAPES = [
    (2, 37, 13, 18, 45, (3, 3), (1, 1), (1, 1), (1, 1), 1, False),
    (8, 64, 6, 8, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1, True),
    (1, 48, 40, 130, 33, (3, 3), (2, 2), (2, 2), (2, 2), 4, True),
    (1, 130, 9, 31, 129, (3, 3), (1, 1), (1, 1), (1, 1), 1, False),
    (3, 66, 50, 21, 70, (3, 3), (1, 1), (1, 1), (1, 1), 2, True, 2),
    (2, 24, 19, 33, 48, (3, 3), (1, 1), (1, 1), (1, 1), 1, False, 24),
    (1, 5, 120, 101, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1, False),  # several parts in the backward pass
]


def make_case(shape, kind="random", dtype=torch.float32, seed=0):
    """Arguments of a call; `kind` says what the offsets are like."""
    images, channels, height, width, outputs, kernel, stride, padding, dilation, groups, with_mask, *rest = shape
    draw = torch.Generator().manual_seed(seed)
    size = [
        (length + 2 * p - d * (k - 1) - 1) // s + 1
        for length, p, d, k, s in zip((height, width), padding, dilation, kernel, stride, strict=True)
    ]
    taps = kernel[0] * kernel[1]
    offset = torch.randn(images, 2 * taps * groups, *size, generator=draw, dtype=dtype)
    offset = {
        "random": lambda: offset * 2,
        "integers": lambda: (offset * 2).round(),
        "zero": lambda: offset * 0,
        "far": lambda: offset * 1e6,
        "huge": lambda: offset.sign() * 1e30,
        "halves": lambda: (offset * 4).round() / 2,
    }[kind]()
    mask = torch.rand(images, taps * groups, *size, generator=draw, dtype=dtype) if with_mask else None
    arguments = {
        "input": torch.randn(images, channels, height, width, generator=draw, dtype=dtype),
        "offset": offset,
        "weight": torch.randn(outputs, channels // (rest[0] if rest else 1), *kernel, generator=draw, dtype=dtype),
        "bias": torch.randn(outputs, generator=draw, dtype=dtype),
        "mask": mask,
    }
    return arguments, {"stride": stride, "padding": padding, "dilation": dilation}


def with_gradients(function, arguments, options, seed=1):
    leaves = {name: None if t is None else t.detach().requires_grad_() for name, t in arguments.items()}
    output = function(**leaves, **options)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    output.backward(upstream.to(output.dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves.values() if leaf is not None)]


def assert_all_close(ours, theirs, tolerance=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, b.abs().max().item() if b.numel() else 1.0))


@pytest.mark.parametrize("kind", ["random", "integers", "zero", "far", "huge", "halves"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_loops(shape, kind):
    arguments, options = make_case(shape, kind)
    expected = twin(**{k: None if t is None else t.double().numpy() for k, t in arguments.items()}, **options)
    ours = deform_conv2d(**arguments, **options)
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-5 * max(1, np.abs(expected).max()))


@needs_native
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("kind", ["random", "integers", "far"])
@pytest.mark.parametrize("shape", SHAPES + BIG_SHAPES)
def test_values_and_gradients_are_torchvisions(shape, kind, memory_format, variant, monkeypatch):
    monkeypatch.setenv("UPSNET_NATIVE_CPU", variant)
    arguments, options = make_case(shape, kind)
    arguments["input"] = arguments["input"].contiguous(memory_format=memory_format)
    ours = with_gradients(deform_conv2d, arguments, options)
    assert_all_close(ours, with_gradients(torchvision.ops.deform_conv2d, arguments, options))
    assert ours[0].is_contiguous(memory_format=memory_format)


def test_fixture_of_the_original(shared):
    for config in ("resnet50_coco_16gpu", "resnet50_cityscapes_16gpu"):
        data = np.load(shared(f"reference/oracle_fixtures/units_{config}.npz"))
        get = {k.split("::")[-1]: torch.from_numpy(data[k]) for k in data.files if k.startswith("deform_layer")}
        offset = torch.nn.functional.conv2d(get["x"], get["conv_offset.weight"], get["conv_offset.bias"], padding=1)
        ours = deform_conv2d(get["x"], offset, get["conv.weight"], get["conv.bias"], padding=1)
        assert_all_close([ours], [get["y"]])


@needs_native
@pytest.mark.parametrize("kind", ["random", "far"])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], SHAPES[5]])
def test_gradients_in_double(shape, kind):
    arguments, options = make_case(shape, kind, torch.float64)
    leaves = [None if t is None else t.requires_grad_() for t in arguments.values()]

    def call(input, offset, weight, bias, mask):
        return deform_conv2d(input, offset, weight, bias, mask=mask, **options)

    assert torch.autograd.gradcheck(call, leaves, eps=1e-7, atol=1e-5)


@needs_native
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["random", "far"])
@pytest.mark.parametrize("shape", BIG_SHAPES)
def test_thread_count_changes_no_bit(shape, kind, variant, monkeypatch):
    monkeypatch.setenv("UPSNET_NATIVE_CPU", variant)
    arguments, options = make_case(shape, kind)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(with_gradients(deform_conv2d, arguments, options))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
@pytest.mark.parametrize("shape", BIG_SHAPES)
def test_avx_variants_give_the_same_bits(shape, monkeypatch):
    """Forward, and the gradients of input, weight and bias; those of offset and mask are sums over a vector's lanes."""
    arguments, options = make_case(shape)
    results = []
    for variant in ("avx2", "avx512"):
        monkeypatch.setenv("UPSNET_NATIVE_CPU", variant)
        output, grad_input, _, grad_weight, grad_bias, *_ = with_gradients(deform_conv2d, arguments, options)
        results.append((output, grad_input, grad_weight, grad_bias))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_views_and_mixed_layouts(memory_format):
    arguments, options = make_case(BIG_SHAPES[1])
    expected = with_gradients(torchvision.ops.deform_conv2d, arguments, options)
    views = {name: spread(tensor, memory_format) for name, tensor in arguments.items()}
    assert_all_close(with_gradients(deform_conv2d, views, options), expected)


def spread(tensor, memory_format):
    """The same values as a view with gaps between them."""
    if tensor.dim() != 4:
        return torch.stack([tensor, tensor], -1)[..., 0]
    tensor = tensor.contiguous(memory_format=memory_format)
    wide = torch.nn.functional.pad(tensor, (1, 2, 1, 1))[:, :, 1:-1, 1:-2]
    assert not wide.is_contiguous() and torch.equal(wide, tensor)
    return wide


def test_output_gradient_in_any_layout():
    arguments, options = make_case(BIG_SHAPES[0])
    leaf = arguments["input"].clone().requires_grad_()

    def gradient(change):
        output = deform_conv2d(**{**arguments, "input": leaf}, **options)
        upstream = change(torch.ones_like(output) * torch.arange(output.shape[-1]))
        return torch.autograd.grad(output, leaf, upstream)[0]

    expected = gradient(lambda g: g)
    assert torch.equal(gradient(lambda g: g.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(gradient(lambda g: g.mT.contiguous().mT), expected)
    ones = gradient(torch.ones_like)
    assert torch.equal(gradient(lambda g: torch.ones(()).expand(g.shape)), ones)  # strides 0, as sum() gives


@pytest.mark.parametrize("below", [1e-7, 1e-6, 4e-6])
def test_offsets_just_below_an_integer(below):
    """The first row that a part of the backward reaches must be the one it writes: sums as y + 1 round up at y = 64."""
    draw = torch.Generator().manual_seed(0)
    input = torch.randn(1, 16, 104, 152, generator=draw).requires_grad_()
    offset, weight = torch.full((1, 18, 104, 152), -below), torch.randn(16, 16, 3, 3, generator=draw)
    upstream = torch.randn(1, 16, 104, 152, generator=draw)
    ours, theirs = (
        torch.autograd.grad(operator(input, offset, weight, padding=1), input, upstream)[0]
        for operator in (deform_conv2d, torchvision.ops.deform_conv2d)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_empty_batch():
    arguments, options = make_case(SHAPES[0])
    arguments = {**arguments, "input": arguments["input"][:0], "offset": arguments["offset"][:0]}
    output, *grads = with_gradients(deform_conv2d, arguments, options)
    assert output.shape == (0, 3, 5, 6)
    assert all((grad == 0).all() for grad in grads)


@needs_native
def test_damaged_offsets_stay_visible():
    arguments, options = make_case(SHAPES[0])
    arguments["offset"][0, 0, 2, 2] = float("nan")
    bad = deform_conv2d(**arguments, **options).isnan()
    assert bad[0, :, 2, 2].all() and bad.sum() == 3


@needs_native
@pytest.mark.parametrize("memory_format", FORMATS)
def test_operator_checks_of_torch(memory_format):
    arguments, options = make_case(SHAPES[1])
    arguments["input"] = arguments["input"].contiguous(memory_format=memory_format)
    leaves = [t.requires_grad_() for t in arguments.values()]
    torch.library.opcheck(torch.ops.upsnet.deform_conv2d.default, (*leaves, *options.values()))
    halves = [t.detach().bfloat16().requires_grad_() if i in (0, 2, 3) else t for i, t in enumerate(leaves)]
    torch.library.opcheck(torch.ops.upsnet.deform_conv2d.default, (*halves, *options.values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("places", ["float32", "half"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [*SHAPES, *BIG_SHAPES])
def test_half_precision(shape, variant, places, dtype, monkeypatch):
    monkeypatch.setenv("UPSNET_NATIVE_CPU", variant)
    arguments, options = make_case(shape)
    arguments = {name: tensor for name, tensor in arguments.items() if tensor is not None}
    halves = {name: tensor.to(dtype) for name, tensor in arguments.items()}
    if places == "float32":
        halves.update({name: arguments[name] for name in ("offset", "mask") if name in arguments})
    expected = with_gradients(deform_conv2d, {name: tensor.float() for name, tensor in halves.items()}, options)
    found = with_gradients(deform_conv2d, halves, options)
    assert [tensor.dtype for tensor in found[1:]] == [tensor.dtype for tensor in halves.values()]
    assert found[0].dtype == dtype
    assert_all_close([tensor.float() for tensor in found], expected, tolerance=0.01)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_autocast_keeps_places_exact(given):
    arguments, options = make_case(SHAPES[1])
    arguments["input"] = arguments["input"].to(given)
    expected_of = {name: arguments[name].bfloat16() for name in ("input", "weight", "bias")}
    expected = deform_conv2d(**{**arguments, **expected_of}, **options)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in arguments.items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = deform_conv2d(**leaves, **options)
        if library.native_in_use():
            raw = torch.ops.upsnet.deform_conv2d(*leaves.values(), *options.values())
            assert torch.equal(raw, found)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    found.sum().backward()
    assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves.values())
    double = {name: tensor.double() for name, tensor in arguments.items()}
    with torch.autocast("cpu", torch.bfloat16):
        assert deform_conv2d(**double, **options).dtype == torch.float64


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("input", torch.int64),
        ("weight", torch.float64),
        ("bias", torch.float16),
        ("offset", torch.bfloat16),
        ("mask", torch.float64),
    ],
)
def test_wrong_types_are_refused_by_name(name, dtype):
    arguments, options = make_case(SHAPES[1])
    with pytest.raises(ValueError, match=f"{name} is of {dtype}"):
        deform_conv2d(**{**arguments, name: arguments[name].to(dtype)}, **options)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"input": torch.zeros(4, 5, 6)}, "input"),
        ({"offset": torch.zeros(1, 17, 5, 6)}, "offset"),
        ({"offset": torch.zeros(1, 18, 5, 7)}, "offset"),
        ({"offset": torch.zeros(2, 18, 5, 6)}, "offset"),
        ({"weight": torch.zeros(3, 5, 3, 3)}, "weight"),
        ({"weight": torch.zeros(3, 2, 3, 3)}, "weight"),
        ({"bias": torch.zeros(4)}, "bias"),
        ({"mask": torch.zeros(1, 8, 5, 6)}, "mask"),
        ({"stride": 0}, "stride"),
        ({"padding": -1}, "padding"),
        ({"input": torch.zeros(1, 4, 0, 6)}, "input"),
    ],
)
def test_wrong_shapes_are_refused_by_name(change, word):
    arguments, options = make_case(SHAPES[0])
    with pytest.raises(ValueError, match=word):
        deform_conv2d(**{**arguments, **options, **change})


def test_switched_off_gives_the_same_numbers(tmp_path):
    """A process without the library: torchvision serves, says so, and agrees."""
    arguments, options = make_case(BIG_SHAPES[0])
    torch.save((arguments, options), tmp_path / "case.pt")
    script = (
        "import sys, torch; from upsnet.operators import deform_conv2d, describe\n"
        "a, o = torch.load(sys.argv[1] + '/case.pt')\n"
        "torch.save(deform_conv2d(**a, **o), sys.argv[1] + '/out.pt'); print(describe())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "UPSNET_NATIVE": "0", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "not in use" in done.stdout and "UPSNET_NATIVE=0" in done.stdout
    assert_all_close([torch.load(tmp_path / "out.pt")], [deform_conv2d(**arguments, **options)])


def test_gradients_of_gradients_are_refused():
    arguments, options = make_case(SHAPES[1])
    input = arguments["input"].requires_grad_()
    output = deform_conv2d(**arguments, **options)
    (gradient,) = torch.autograd.grad(output.square().sum(), input, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|differentiated twice"):
        torch.autograd.grad(gradient.square().sum(), input)


@pytest.mark.parametrize("content", [None, b"", b"not a library"])
def test_missing_or_broken_library_steps_aside(content, tmp_path, monkeypatch):
    module = importlib.import_module("upsnet.operators.library")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "library.py"))
    monkeypatch.delenv("UPSNET_NATIVE", raising=False)
    if content is not None:
        (tmp_path / "_native.abi3.so").write_bytes(content)
    reason = module._load("_native", ())
    assert ("not built" if content is None else "does not load") in reason
    monkeypatch.setattr(module, "NOT_IN_USE_BECAUSE", reason)
    assert not module.covers("nms_flags", torch.zeros(1, 4)) and reason in module.describe()
    arguments, options = make_case(SHAPES[0])
    assert torch.equal(deform_conv2d(**arguments, **options), torchvision.ops.deform_conv2d(**arguments, **options))
