"""Convolution with addition and ReLU in one call against the three one after another."""

import pytest
import torch
from torch.nn import functional as F

from upsnet.operators import fast_linear, fused_conv, fused_conv2d

close = torch.testing.assert_close


@pytest.fixture(params=["library", "missing", "another signature", "another answer"])
def library(request, monkeypatch):
    """The library as it is here, and what another torch may bring."""

    def broken(*arguments):
        if request.param == "missing":
            raise AttributeError
        if request.param == "another signature":
            raise TypeError
        return arguments[0][:, :1]

    if request.param != "library":
        fused_conv._library_fuses.cache_clear()
        request.addfinalizer(fused_conv._library_fuses.cache_clear)
        monkeypatch.setattr(fused_conv, "_fused", broken)


def case(shape, outputs=5, kernel=3, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    input = torch.randn(shape, generator=draw).to(dtype)
    weight = torch.randn(outputs, shape[1], kernel, kernel, generator=draw).to(dtype)
    return input, weight, torch.randn(outputs, generator=draw).to(dtype)


SHAPES = [(2, 3, 9, 7), (1, 3, 1, 1), (0, 3, 4, 4), (3, 16, 14, 14), (1, 3, 2, 30)]
nearly = {"rtol": 1e-5, "atol": 1e-5}


@torch.no_grad()
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0), (1, 2, 0), (7, 2, 3)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_operations_one_by_one(shape, kernel, stride, padding, memory_format):
    input, weight, bias = case(shape, kernel=kernel)
    input, weight = (tensor.contiguous(memory_format=memory_format) for tensor in (input, weight))
    for b in (bias, None):
        given = input, weight, b, (stride, stride), (padding, padding)
        expected = F.conv2d(input, weight, b, stride, padding)
        add = torch.randn_like(expected)
        close(fused_conv2d(*given), expected, **nearly)
        close(fused_conv2d(*given, relu=True), expected.relu(), **nearly)
        close(fused_conv2d(*given, add=add.clone()), expected + add, **nearly)
        close(fused_conv2d(*given, True, add.clone()), (expected + add).relu(), **nearly)


@torch.no_grad()
@pytest.mark.usefixtures("library")
def test_views_that_are_not_contiguous():
    input, weight, bias = case((2, 3, 12, 20))
    view, add = input[:, :, 1::2, 3::3], torch.randn(2, 12, 6, 6)[:, 2:7]
    expected = F.relu(F.conv2d(view, weight, bias, padding=1) + add)
    close(fused_conv2d(view, weight, bias, padding=(1, 1), relu=True, add=add), expected, **nearly)


@torch.no_grad()
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_types(dtype):
    input, weight, bias = case((2, 8, 6, 5), dtype=dtype)
    expected = F.conv2d(input.double(), weight.double(), bias.double(), padding=1)
    add = torch.randn_like(expected).to(dtype)
    found = fused_conv2d(input.float(), weight, bias, padding=(1, 1), relu=True, add=add.float())
    assert found.dtype == dtype
    tolerance = {"rtol": 0.02, "atol": 0.05} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-6}
    close(found.double(), (expected + add).relu(), **tolerance)


@pytest.mark.usefixtures("library")
def test_the_result_lies_with_channels_innermost():
    input, weight, bias = case((2, 16, 6, 5), outputs=8)
    weight = weight.contiguous(memory_format=torch.channels_last)
    assert fused_conv2d(input, weight, bias).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("library")
def test_gradients():
    input, weight, bias = (tensor.double().requires_grad_() for tensor in case((2, 3, 6, 5)))
    add = torch.randn(2, 5, 6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *given: fused_conv2d(*given[:3], padding=(1, 1), relu=True, add=given[3]), (input, weight, bias, add)
    )
    single = [tensor.detach().float().requires_grad_() for tensor in (input, weight, bias, add)]
    kept = single[3].clone()
    assert fused_conv2d(*single[:3], padding=(1, 1), add=single[3]).requires_grad
    assert torch.equal(single[3], kept)


@torch.no_grad()
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("rows", [0, 1, 7, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_linear(rows, dtype):
    draw = torch.Generator().manual_seed(rows)
    input, weight = torch.randn(rows, 60, generator=draw), torch.randn(9, 60, generator=draw).to(dtype)
    bias = torch.randn(9, generator=draw).to(dtype)
    found = fast_linear(input, weight, bias)
    assert found.shape == (rows, 9) and found.dtype == dtype and found.is_contiguous()
    expected = F.linear(input.to(dtype).double(), weight.double(), bias.double())
    tolerance = {"rtol": 0.02, "atol": 0.1} if dtype == torch.bfloat16 else nearly
    close(found.double(), expected, **tolerance)
    wide = torch.randn(rows, 120, generator=draw)[:, ::2]
    close(fast_linear(wide, weight.double()), F.linear(wide.double(), weight.double()))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_the_library_is_in_use_where_it_is_there(monkeypatch):
    input, weight, bias = case((2, 3, 6, 5))
    seen = []
    assert fused_conv._library_fuses(torch.float32) and not fused_conv._library_fuses(torch.float64)
    monkeypatch.setattr(fused_conv, "_fused", lambda *given: seen.append(given[0].dtype))
    fused_conv2d(input, weight, bias)
    many, few = torch.zeros(fused_conv.FEWEST_ROWS, 5), torch.zeros(fused_conv.FEWEST_ROWS - 1, 5)
    ones = torch.ones(4, 5)
    for rows, factors in ((few, ones), (many, ones.bfloat16()), (many, ones.clone().requires_grad_())):
        fast_linear(rows, factors)  # slower by the library, and the last one learns
    fused_conv2d(input.double(), weight.double())
    assert seen == [torch.float32]
    monkeypatch.setattr(fused_conv, "_fused", lambda input, *_: seen.append(input.stride()) or input)
    fast_linear(many, ones)
    assert seen[1] == (1280, 1, 5, 5), "else the library copies it"


@pytest.mark.usefixtures("library")
def test_what_does_not_fit_is_refused_by_name():
    input, weight, bias = case((2, 3, 6, 5))
    for wrong in (input[0], input[:, :2]):
        with pytest.raises(ValueError, match="fused_conv2d: input has shape"):
            fused_conv2d(wrong, weight, bias)
    with pytest.raises(ValueError, match=r"fused_conv2d: add has shape \(2, 5, 6, 5\), \(2, 5, 4, 3\) is expected"):
        fused_conv2d(input, weight, bias, add=torch.zeros(2, 5, 6, 5))
    with pytest.raises(ValueError, match="fused_conv2d: weight has shape"):
        fused_conv2d(input, weight[0], bias)
