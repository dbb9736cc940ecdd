"""RoIAlign over a pyramid: against one box and one sample at a time; promises about threads, layouts and errors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.reference import roi_align as twin
from tests.syncs import count_syncs
from upsnet.operators import library
from upsnet.operators.pyramid_roi_align import pyramid_roi_align, roi_levels

close = torch.testing.assert_close
needs_native = pytest.mark.skipif(not library.native_in_use(), reason=library.NOT_IN_USE_BECAUSE)
FORMATS = (torch.contiguous_format, torch.channels_last)
VARIANTS = ("generic", "avx2", "avx512")


@pytest.fixture(params=["native", "fallback"])
def path(request, monkeypatch):
    """Runs a test on both paths."""
    if request.param == "fallback":
        monkeypatch.setattr(library, "covers", lambda *call: False)
    elif not library.native_in_use():
        pytest.skip(library.NOT_IN_USE_BECAUSE)


def pyramid(channels=3, side=256, images=2, seed=0, dtype=torch.float32, memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(images, channels, side // (4 * 2**i), side // (4 * 2**i)) for i in range(4)]
    levels = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    return [level.contiguous(memory_format=memory_format) for level in levels]


def random_rois(count=40, seed=1):
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(count, 2, generator=generator) * 200
    return rois_of(torch.cat([start, start + torch.rand(count, 2, generator=generator) ** 2 * 400], dim=1).tolist())


def with_gradients(function, features, rois, output_size, aligned=False):
    """The pooled features, and each level's gradient of a weighted sum of them."""
    leaves = [feature.detach().requires_grad_() for feature in features]
    pooled = function(leaves, rois, output_size, aligned)
    draw = torch.Generator().manual_seed(2)
    pooled.backward(torch.randn(pooled.shape, generator=draw).to(pooled.dtype))
    return [pooled.detach(), *(leaf.grad for leaf in leaves)]


def square(side, at=0.0):
    return [at, at, at + side - 1, at + side - 1]


def rois_of(boxes):
    return torch.tensor([[i % 2, *box] for i, box in enumerate(boxes)], dtype=torch.float32).reshape(-1, 5)


NASTY = [
    square(1, 7.0),  # one pixel
    square(111.9),
    square(112.0),  # just on the next level
    square(223.9),
    square(224.0),
    square(447.9),
    square(448.0),
    square(2000.0),
    [-40.0, -40, -8, -8],  # outside
    [240.0, 240, 300, 300],  # over the border
    [254.6, 254.6, 255, 255],
    [0.0, 100, 255, 101],  # long and thin
    [10.25, 3.75, 90.5, 77.125],
]


def test_levels_are_those_of_the_rule():
    sides = {1: 0, 111.9: 0, 112: 1, 223.9: 1, 224: 2, 447.9: 2, 448: 3, 1e5: 3}
    assert roi_levels(torch.tensor([square(side) for side in sides])).tolist() == list(sides.values())
    # The geometric mean of the sides counts.
    assert roi_levels(torch.tensor([[0.0, 0, 447, 111], [0.0, 0, 447, 110]])).tolist() == [2, 1]
    assert roi_levels(torch.zeros(0, 4)).shape == (0,)


def test_the_small_term_of_the_rule_stands_inside_the_logarithm():
    """A box whose area falls short of 112² by 2.8e-6 of it is lifted over the border only so."""
    just_short = torch.tensor([[0.0, 0.0, 111.0, 112 * (1 - 2.8e-6) - 1]])
    assert roi_levels(just_short).tolist() == [1]
    assert roi_levels(torch.tensor([[0.0, 0.0, 111.0, 112 * (1 - 6e-6) - 1]])).tolist() == [0]


@needs_native
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("output_size", [1, 7])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("channels", [3, 85])
def test_roi_by_roi(channels, variant, output_size, memory_format, aligned, monkeypatch):
    monkeypatch.setenv("UPSNET_NATIVE_CPU", variant)
    features = pyramid(channels, memory_format=memory_format)
    rois = torch.cat([rois_of(NASTY), random_rois(20)])
    assert set(roi_levels(rois[:, 1:]).tolist()) == {0, 1, 2, 3}
    ours = with_gradients(pyramid_roi_align, features, rois, output_size, aligned)
    for a, b in zip(ours, with_gradients(twin.pyramid_roi_align, features, rois, output_size, aligned), strict=True):
        close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
        assert a.is_contiguous(memory_format=memory_format)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("num_levels", [1, 2, 5])
@pytest.mark.parametrize("output_size", [1, 14])
def test_other_pyramids(output_size, num_levels):
    features = [*pyramid(), torch.randn(2, 3, 1, 2)][:num_levels]
    rois = torch.cat([rois_of(NASTY), random_rois(), rois_of([square(999), square(896)])])
    close(pyramid_roi_align(features, rois, output_size), twin.pyramid_roi_align(features, rois, output_size))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("box", NASTY, ids=str)
def test_sample_by_sample(box, aligned):
    features = pyramid(channels=1, images=1)
    level = twin.level_of(box)
    expected = twin.roi_align_by_samples(features[level][0, 0].tolist(), box, 1 / (4 * 2**level), 3, aligned)
    pooled = pyramid_roi_align(features, torch.tensor([[0.0, *box]]), 3, aligned)
    close(pooled[0, 0], torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("memory_format", FORMATS)
def test_nothing_to_pool(memory_format):
    pooled, *grads = with_gradients(pyramid_roi_align, pyramid(memory_format=memory_format), torch.zeros(0, 5), 7)
    assert pooled.shape == (0, 3, 7, 7)
    assert all((grad == 0).all() for grad in grads)
    for empty in (pyramid(images=0), pyramid(channels=0)):
        assert with_gradients(pyramid_roi_align, empty, torch.zeros(0, 5), 2)[1].shape == empty[0].shape


@pytest.mark.usefixtures("path")
def test_one_pixel_one_channel():
    features = [torch.full((1, 1, 1, 1), 3.0)]
    close(pyramid_roi_align(features, torch.tensor([[0.0, 0, 0, 2, 2]]), 1), torch.full((1, 1, 1, 1), 3.0))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_boxes_at_no_number_give_zero(value, memory_format):
    rois = rois_of(NASTY[:4] * 3)
    expected = pyramid_roi_align(pyramid(), rois, 3)
    for i in range(5):
        damaged = rois.clone()
        damaged[i, 1 + i % 4] = value
        features = pyramid(memory_format=memory_format)
        pooled, *grads = with_gradients(pyramid_roi_align, features, damaged, 3)
        assert (pooled[i] == 0).all() and all(grad.isfinite().all() for grad in grads)
        rest = torch.arange(len(rois)) != i
        close(pooled[rest], expected[rest])


@pytest.mark.usefixtures("path")
def test_huge_boxes_and_boxes_beyond_the_map():
    rois = rois_of([[-3e38, -3e38, 3e38, 3e38], [1e30, 0, 2e30, 9], [0, 0, 1e9, 1e9], [-900, -900, -500, -500]])
    pooled, *grads = with_gradients(pyramid_roi_align, pyramid(), rois, 7)
    assert (pooled == 0).all() and all((grad == 0).all() for grad in grads)


@needs_native
@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_operator_alone_reads_nothing_outside(memory_format):
    """Called past the Python face, with levels that are none and boxes that no order has."""
    features = pyramid(memory_format=memory_format)
    rois = torch.cat([rois_of(NASTY), torch.full((9, 5), float("nan"))])
    rois[:, 0] = 1
    levels = torch.randint(0, 4, (len(rois),), generator=torch.Generator().manual_seed(0))
    levels[:3] = torch.tensor([-(2**63), -1, 4])
    pooled = torch.ops.upsnet.pyramid_roi_align(features, rois, levels, [0.25, 0.125, 1e30, -1.0], 7, False)
    assert (pooled[:3] == 0).all() and (pooled[-9:] == 0).all() and pooled.isfinite().all()


@needs_native
def test_a_damaged_pixel_shows_only_where_it_is_read():
    features = pyramid(channels=1, images=1)
    features[0][0, 0, 0, 0] = float("nan")
    rois = torch.zeros(3, 5)
    rois[:, 1:] = torch.tensor([[-40.0, -40, -8, -8], [20, 20, 60, 60], [0, 0, 27, 27]])
    bad = pyramid_roi_align(features, rois, 7).isnan().flatten(1)
    assert bad.any(dim=1).tolist() == [False, False, True] and not bad.all()


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("image", [-1.0, 2.0, float("nan"), 1e20])
def test_an_image_that_is_not_there_is_refused(image):
    rois = rois_of(NASTY)
    rois[4, 0] = image
    with pytest.raises(RuntimeError, match="rois name an image"):
        pyramid_roi_align(pyramid(), rois, 7)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("memory_format", FORMATS)
def test_gradients_in_double(memory_format):
    features = pyramid(channels=2, side=64, images=1, dtype=torch.float64, memory_format=memory_format)
    rois = torch.tensor([[0.0, 3, 5, 40, 50], [0, 2, 2, 150, 130], [0, 0, 0, 240, 260], [0, 10, 0, 600, 500]])
    rois = torch.cat([rois, torch.tensor([[0, 9.0, 9, 9, 9]])]).double()
    assert set(roi_levels(rois[:, 1:]).tolist()) == {0, 1, 2, 3}
    leaves = [feature.requires_grad_() for feature in features]
    assert torch.autograd.gradcheck(lambda *levels: pyramid_roi_align(levels, rois, 2), leaves, fast_mode=True)


@pytest.mark.usefixtures("path")
def test_gradients_of_gradients_are_refused():
    features = [level.requires_grad_() for level in pyramid()]
    pooled = pyramid_roi_align(features, random_rois(), 2)
    (gradient, *_) = torch.autograd.grad(pooled.square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|differentiated twice"):
        torch.autograd.grad(gradient.square().sum(), features)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thread_count_and_variant_change_no_bit(dtype, monkeypatch):
    features, rois = pyramid(85, dtype=dtype, memory_format=torch.channels_last), random_rois(80)
    before = torch.get_num_threads()
    results = []
    try:
        for variant, threads in [(variant, 1) for variant in VARIANTS] + [("avx512", 2), ("avx512", 5)]:
            monkeypatch.setenv("UPSNET_NATIVE_CPU", variant)
            torch.set_num_threads(threads)
            results.append(with_gradients(pyramid_roi_align, features, rois, 7))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("path")
def test_views_and_mixed_layouts():
    features, rois = pyramid(), random_rois()
    expected = with_gradients(pyramid_roi_align, features, rois, 7)
    views = [torch.nn.functional.pad(feature, (1, 2, 1, 1))[:, :, 1:-1, 1:-2] for feature in features]
    views[1] = features[1].contiguous(memory_format=torch.channels_last)
    assert not views[0].is_contiguous()
    ours = with_gradients(pyramid_roi_align, views, torch.stack([rois, rois], 2)[..., 0], 7)
    for a, b in zip(ours, expected, strict=True):
        close(a, b)


@needs_native
@pytest.mark.parametrize("memory_format", FORMATS)
def test_output_gradient_in_any_layout(memory_format):
    features = [level.requires_grad_() for level in pyramid(memory_format=memory_format)]
    pooled = pyramid_roi_align(features, random_rois(), 7)
    upstream = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(0))
    layouts = (upstream, upstream.contiguous(memory_format=torch.channels_last), upstream.mT.contiguous().mT)
    expected, *others = (torch.autograd.grad(pooled, features, layout, retain_graph=True) for layout in layouts)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(expected, other, strict=True))
    torch.autograd.grad(pooled.sum(), features)  # strides of 0


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_positions(dtype, memory_format):
    # Eight bits of mantissa would move a box at 1000 pixels by up to 4.
    features = [level.to(dtype) for level in pyramid(70, side=1024, images=1, memory_format=memory_format)]
    rois = torch.tensor([[0.0, 901.3, 933.7, 987.2, 999.1], [0, 515.7, 3.3, 1017.9, 505.6]])
    ours = with_gradients(pyramid_roi_align, features, rois, 7)
    exact = with_gradients(pyramid_roi_align, [level.float() for level in features], rois, 7)
    assert ours[0].is_contiguous(memory_format=memory_format)
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == dtype
        close(a.float(), b, rtol=0.01, atol=0.01)


@needs_native
@pytest.mark.parametrize("memory_format", FORMATS)
def test_rounding_to_bfloat16_is_torchs(memory_format):
    """Also of what is no number: a map of constants gives them back."""
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, 1e-40, -3.4e38])
    values = torch.cat([values, torch.randn(70, generator=torch.Generator().manual_seed(0))]).bfloat16()
    feature = values[None, :, None, None].expand(1, -1, 8, 8).contiguous(memory_format=memory_format)
    pooled = pyramid_roi_align([feature], torch.tensor([[0.0, 4, 4, 24, 24]]), 1)[0, :, 0, 0]
    close(
        pooled,
        pyramid_roi_align([feature.float()], torch.tensor([[0.0, 4, 4, 24, 24]]), 1)[0, :, 0, 0].bfloat16(),
        equal_nan=True,
        rtol=0,
        atol=0,
    )


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    features, rois = pyramid(dtype=dtype), random_rois()
    with torch.autocast("cpu", torch.bfloat16):
        pooled = pyramid_roi_align(features, rois, 7)
    assert pooled.dtype == dtype and torch.equal(pooled, pyramid_roi_align(features, rois, 7))


@needs_native
def test_autocast_rule_of_the_operator():
    """Boxes that came out of a half precision operator are widened."""
    features, rois = pyramid(dtype=torch.bfloat16), random_rois().bfloat16()
    levels = roi_levels(rois[:, 1:].float())
    with torch.autocast("cpu", torch.bfloat16):
        pooled = torch.ops.upsnet.pyramid_roi_align(features, rois, levels, [1 / 4, 1 / 8, 1 / 16, 1 / 32], 7, False)
    assert torch.equal(pooled, pyramid_roi_align(features, rois.float(), 7))


@needs_native
def test_nothing_is_asked_of_a_device():
    features, rois = [level.requires_grad_() for level in pyramid()], random_rois()
    with count_syncs() as syncs:
        pyramid_roi_align(features, rois, 7).sum().backward()
    assert not len(syncs), syncs


@needs_native
@pytest.mark.parametrize("memory_format", FORMATS)
def test_operator_checks_of_torch(memory_format):
    features = [level.requires_grad_() for level in pyramid(side=64, memory_format=memory_format)]
    rois = rois_of(NASTY)
    arguments = (features, rois, roi_levels(rois[:, 1:]), [1 / 4, 1 / 8, 1 / 16, 1 / 32], 3, False)
    torch.library.opcheck(torch.ops.upsnet.pyramid_roi_align.default, arguments)


@needs_native
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("crop", [(2, 3, 3, 4), (1, 3, 1, 4), (1, 3, 2, 4), (2, 1, 3, 4), (1, 3, 2, 2), (1, 2, 3, 4)])
def test_rules_foretell_the_layout_of_views(crop, channels_last):
    """The strides of one image, one row or one channel say nothing; gaps make a view neither format."""
    whole = torch.randn(2, 3, 3, 4)
    if channels_last:
        whole = whole.contiguous(memory_format=torch.channels_last)
    features, rois, levels = whole[tuple(map(slice, crop))], rois_of(NASTY[:2]) * 0, torch.zeros(2).long()

    def strides(*arguments):
        pooled = torch.ops.upsnet.pyramid_roi_align([arguments[0]], *arguments[1:], [0.25], 2, False)
        (gradient,) = torch.ops.upsnet.pyramid_roi_align_backward(pooled, [arguments[0]], *arguments[1:], [0.25], False)
        return [
            [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
            for tensor in (pooled, gradient)
        ]

    with FakeTensorMode() as fake:
        foretold = strides(*map(fake.from_tensor, (features, rois, levels)))
    assert strides(features, rois, levels) == foretold


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"features": []}, "levels"),
        ({"features": [torch.zeros(2, 3, 8)]}, r"features\[0\]"),
        ({"features": [torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 4, 4)]}, r"features\[1\]"),
        ({"features": [torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 4, 4)]}, r"features\[1\]"),
        ({"features": [torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 4, 4).double()]}, r"features\[1\]"),
        ({"features": [torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 4, 0)]}, r"features\[1\]"),
        ({"rois": torch.zeros(3, 4)}, "rois"),
        ({"rois": torch.zeros(5)}, "rois"),
        ({"output_size": 0}, "output_size"),
    ],
)
def test_wrong_shapes_are_refused_by_name(change, word):
    with pytest.raises(ValueError, match=word):
        pyramid_roi_align(**{"features": pyramid(), "rois": rois_of(NASTY), "output_size": 7, **change})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_cuda_gives_what_the_cpu_gives(dtype, memory_format, aligned):
    assert library.covers("pyramid_roi_align", torch.zeros(1, device="cuda")), library.CUDA_NOT_IN_USE_BECAUSE
    features = [level.to(dtype) for level in pyramid(85, memory_format=memory_format)]
    rois = torch.cat([rois_of(NASTY), random_rois(), rois_of([[float("nan")] * 4, [-3e38, 0, 3e38, 9]])])
    wide = [level.to(torch.promote_types(dtype, torch.float32)) for level in features]
    expected = with_gradients(pyramid_roi_align, wide, rois, 7, aligned)
    ours = with_gradients_on_cuda(features, rois, 7, aligned)
    tolerance = 1e-4 if dtype in library.FLOATS else 0.02
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == dtype and a.is_contiguous(memory_format=memory_format)
        close(a.cpu().to(b.dtype), b, rtol=tolerance, atol=tolerance)


def with_gradients_on_cuda(features, rois, output_size, aligned):
    leaves = [feature.cuda().requires_grad_() for feature in features]
    pooled = pyramid_roi_align(leaves, rois.cuda(), output_size, aligned)
    draw = torch.Generator().manual_seed(2)
    pooled.backward(torch.randn(pooled.shape, generator=draw).to(pooled))
    return [pooled.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_an_image_that_is_not_there_gives_zero():
    rois = rois_of(NASTY).cuda()
    expected = pyramid_roi_align([level.cuda() for level in pyramid()], rois, 7)
    rois[:3, 0] = torch.tensor([-1.0, 2.0, float("nan")])
    pooled = pyramid_roi_align([level.cuda() for level in pyramid()], rois, 7)
    assert (pooled[:3] == 0).all()
    close(pooled[3:], expected[3:])
    assert pyramid_roi_align([level.cuda() for level in pyramid()], rois[:0], 7).shape == (0, 3, 7, 7)
