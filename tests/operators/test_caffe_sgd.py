"""A step of SGD over many tensors: the loops' numbers, the bits of the plain path, any layout."""

import pytest
import torch

from tests.reference.optimizer import SlowCaffeSGD
from upsnet.operators import caffe_sgd_, library

needs_native = pytest.mark.skipif(not library.native_in_use(), reason=library.NOT_IN_USE_BECAUSE)
SHAPES = [(5, 3, 2, 2), (), (0,), (1,), (65,), (7, 1), (40, 33, 3, 3), (3, 1, 1, 5), (64, 16, 1, 1)]
RULE = (0.0123, 0.9, 0.01)  # rate, momentum, weight decay


def random_tensors(seed, channels_last=False):
    draw = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=draw) for shape in SHAPES]
    if channels_last:
        tensors = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
    return tensors


def after_steps(parameters, gradients, buffers, rule=RULE, steps=3):
    """Copies of parameters and buffers, in the layouts given, after some steps."""
    parameters = [t.clone(memory_format=torch.preserve_format) for t in parameters]
    buffers = [t.clone(memory_format=torch.preserve_format) for t in buffers]
    for _ in range(steps):
        caffe_sgd_(parameters, gradients, buffers, *rule)
    return parameters + buffers


def same_bits(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture
def plain(monkeypatch):
    """What the plain path makes of the same call."""

    def call(*arguments, **options):
        with monkeypatch.context() as patches:
            patches.setattr(library, "NOT_IN_USE_BECAUSE", "test")
            return after_steps(*arguments, **options)

    return call


@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("variant", ["generic", "avx2", "avx512"])
def test_like_the_loops(variant, decay, monkeypatch):
    monkeypatch.setenv("UPSNET_NATIVE_CPU", variant)
    parameters, gradients, buffers = (random_tensors(seed) for seed in range(3))
    count = len(parameters)
    slow = SlowCaffeSGD([p.flatten().tolist() for p in parameters], [1.0] * count, [decay] * count, 0.9)
    slow.buffers = [b.flatten().tolist() for b in buffers]
    for _ in range(3):
        slow.step([g.flatten().tolist() for g in gradients], 0.0123)
    ours = after_steps(parameters, gradients, buffers, (0.0123, 0.9, decay))
    for tensor, expected in zip(ours, slow.weights + slow.buffers, strict=True):
        torch.testing.assert_close(tensor.flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="torch does not fuse here")
@pytest.mark.parametrize("rule", [RULE, (0.1, 0.9, 0.0), (0.0, 0.5, 0.1)], ids=str)
@pytest.mark.parametrize("variant", ["avx2", "avx512"])
def test_the_bits_of_the_plain_path(variant, rule, plain, monkeypatch):
    monkeypatch.setenv("UPSNET_NATIVE_CPU", variant)
    case = [random_tensors(seed, channels_last=True) for seed in range(3)]
    case[0][4][3], case[1][4][5] = torch.inf, 1e30
    ours, theirs = after_steps(*case, rule), plain(*case, rule)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("which", ["gradients", "buffers", "parameters"])
def test_any_layout(which):
    """The same numbers wherever they lie: other orders of the dimensions, views with gaps, zero strides."""
    case = {name: random_tensors(seed) for seed, name in enumerate(("parameters", "gradients", "buffers"))}
    expected = after_steps(**case)
    for change in (
        lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
        lambda t: torch.stack([t, t], dim=-1)[..., 0],
        lambda t: t.mT.contiguous().mT if t.dim() >= 2 else t,
    ):
        assert same_bits(after_steps(**{**case, which: [change(t) for t in case[which]]}), expected)
    if which == "gradients":
        case["gradients"] = [torch.ones(()).expand(shape) for shape in SHAPES]
        expected = after_steps(**{**case, "gradients": [torch.ones(shape) for shape in SHAPES]})
        assert same_bits(after_steps(**case), expected)


@needs_native
def test_a_view_with_gaps_keeps_what_is_between():
    wide = torch.ones(6, 4)
    caffe_sgd_([wide[:, ::2]], [torch.ones(6, 2)], [torch.zeros(6, 2)], 0.5, 0.9, 0.0)
    assert wide.tolist() == [[0.5, 1, 0.5, 1]] * 6


def test_threads_change_nothing():
    case = [[torch.randn(300, 400, generator=torch.Generator().manual_seed(s)), *random_tensors(s)] for s in range(3)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = after_steps(*case)
        torch.set_num_threads(3)
        assert same_bits(after_steps(*case), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    case = [random_tensors(seed, channels_last=True) for seed in range(3)]
    on_gpu = after_steps(*([t.cuda() for t in tensors] for tensors in case))
    for ours, theirs in zip(on_gpu, after_steps(*case), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-6)


def test_other_dtypes_and_nothing_at_all():
    caffe_sgd_([], [], [], *RULE)
    case = [random_tensors(seed) for seed in range(3)]
    expected = after_steps(*case)
    doubles = after_steps(*([t.double() for t in tensors] for tensors in case))
    for ours, theirs in zip(doubles, expected, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=1e-6)


@needs_native
def test_autograd_notices_the_change():
    """Without it a step between a pass and its backward would give wrong gradients silently."""
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * weight).sum()
    caffe_sgd_([weight], [torch.ones(3)], [torch.zeros(3)], *RULE)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_native
def test_operator_checks_of_torch():
    parameters, gradients, buffers = (random_tensors(seed)[3:6] for seed in range(3))
    torch.library.opcheck(torch.ops.upsnet.caffe_sgd_.default, (parameters, gradients, buffers, *RULE))


@pytest.mark.parametrize(
    ("gradients", "buffers", "word"),
    [
        ([(2, 3)], [(2, 3), (4,)], "gradients"),
        ([(2, 3), (4,)], [(2, 3), (5,)], "buffers"),
        ([(3, 2), (4,)], [(2, 3), (4,)], "gradients"),
    ],
)
def test_wrong_shapes_are_refused_by_name(gradients, buffers, word):
    parameters, gradients, buffers = (
        [torch.zeros(shape) for shape in shapes] for shapes in ([(2, 3), (4,)], gradients, buffers)
    )
    with pytest.raises(ValueError, match=word):
        caffe_sgd_(parameters, gradients, buffers, *RULE)
