"""The panoptic head's operator: the labels of the whole tensor, of loops, and the same ones on every path."""

import pytest
import torch

from tests.reference import panoptic as twin
from upsnet.operators import fuse_panoptic, library
from upsnet.operators.panoptic_head import remove_hidden, segment_patch
from upsnet.structures.sample import VOID

HEIGHT, WIDTH = 12, 16  # of the scores; the map has four times as much
SIZE = (4 * HEIGHT, 4 * WIDTH)
THINGS = 3
VARIANTS = ("generic", "avx2", "avx512")
native = pytest.mark.skipif(not library.native_in_use(), reason=library.NOT_IN_USE_BECAUSE)

BOXES = {
    "none": [],
    "one": [[6.0, 5, 40, 30]],
    "one pixel": [[9.0, 9, 9, 9]],
    "last pixel": [[63.0, 47, 63, 47], [62.6, 46.6, 63, 47]],
    "whole image": [[0.0, 0, 63, 47], [0, 0, 63, 47], [0, 0, 63, 47]],
    "halves": [[2.5, 3.5, 20.5, 21.5], [3.5, 2.5, 30.49, 11.51]],  # round half to even
    "over the border": [[-9.0, -5, 20, 20], [50, 40, 90, 70], [-30, -30, -10, -10], [100, 100, 120, 110]],
    "inside out": [[20.0, 20, 10, 10], [63.0, 5, 62.99, 20], [5, 30.01, 9, 29.99]],  # clipping makes such boxes
    "many": [[4.0 * i, 3.0 * i, 4.0 * i + 22, 3.0 * i + 25] for i in range(9)],
}


@pytest.fixture(params=[*VARIANTS, "plain"])
def path(request, monkeypatch):
    take(request.param, monkeypatch)


def take(path, monkeypatch):
    """From now on calls go this way: a variant of the native operator, or the plain path."""
    if path == "plain":
        monkeypatch.setattr(library, "NOT_IN_USE_BECAUSE", "test")
    else:
        monkeypatch.setenv("UPSNET_NATIVE_CPU", path)


def instances_of(name, seed=0):
    boxes = torch.tensor(BOXES[name]).reshape(-1, 4)
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(1, THINGS + 1, (len(boxes),), generator=generator)
    return boxes, classes, torch.randn(len(boxes), 7, 7, generator=generator) * 3


def scores_of(num_stuff, seed=1):
    return torch.randn(num_stuff + THINGS, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed)) * 2


def assert_same_labels(found, expected, planes):
    """Equal labels; but of two planes that differ by less than 1e-5 either may win, on few pixels."""
    differ = found.long() != expected.long()
    assert differ.float().mean() < 1e-3
    value = planes.amax(0)
    index = torch.where(found == VOID, len(planes) - 1, found.long())
    assert (value - planes.gather(0, index[None])[0])[differ].lt(1e-5).all()


@pytest.mark.parametrize("unknown", [True, False])
@pytest.mark.parametrize("num_stuff", [0, 20])
@pytest.mark.parametrize("name", BOXES)
@pytest.mark.parametrize("masks", ["random", "all full", "all empty", "half empty"])
def test_same_as_the_whole_tensor(masks, name, num_stuff, unknown, monkeypatch):
    scores, (boxes, classes, logits) = scores_of(num_stuff), instances_of(name)
    if masks == "all full":
        logits = logits.abs() + 0.1  # covers its whole box: those behind others go
    elif masks == "all empty":
        logits = -logits.abs()
    elif masks == "half empty":
        logits[::2] = -logits[::2].abs()
    given = (scores, SIZE, boxes, classes, logits, num_stuff, unknown)
    channel_of_its_own = num_stuff or len(boxes) or unknown
    if channel_of_its_own:
        channels, semantic, kept, planes = twin.fuse(*given[:1], *given[2:], SIZE)
        assert masks != "all empty" or kept == [0][: len(boxes)]
    for path in (*VARIANTS, "plain"):
        take(path, monkeypatch)
        found = fuse_panoptic(*given)
        assert [t.dtype for t in found] == [torch.int16, torch.int16, torch.bool]
        if channel_of_its_own:
            assert_same_labels(found[0], channels, planes)
            assert torch.equal(found[1].long(), semantic)
            assert found[2].nonzero().flatten().tolist() == kept
        else:
            assert found[0].shape == SIZE and len(found[2]) == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", BOXES)
def test_remove_hidden(name, seed):
    boxes, classes, masks = instances_of(name, seed)
    kept, patches = remove_hidden(boxes, classes, masks, SIZE)
    assert kept == twin.remove_hidden(boxes, classes, masks, SIZE)
    for i, (patch, place) in zip(kept, patches, strict=True):
        plane = torch.zeros(SIZE)
        plane[place] = patch
        torch.testing.assert_close(plane, twin.mask_plane(masks[i], boxes[i].tolist(), SIZE))


def test_patches():
    assert segment_patch([2.9, 3.9, 4.5, 5.5], (20, 20)) == (slice(3, 7), slice(2, 5))  # half to even
    assert segment_patch([-5.0, -5, 100, 100], (20, 30)) == (slice(0, 20), slice(0, 30))


@pytest.mark.usefixtures("path")
def test_only_masks_of_the_same_class_hide():
    def kept(boxes, classes):
        return fuse_panoptic(scores_of(2), SIZE, boxes, classes, torch.ones(len(boxes), 7, 7), 2)[2].tolist()

    assert kept(torch.tensor([[4.0, 4, 23, 23]] * 3), torch.tensor([1, 2, 1])) == [True, True, False]
    # exactly 30 % covered is not too much
    boxes = torch.tensor([[0.0, 0, 9, 9], [7, 0, 16, 9], [6, 20, 15, 29], [0, 20, 9, 29]])
    assert kept(boxes, torch.ones(4, dtype=torch.int64)) == [True, True, True, False]


@pytest.mark.usefixtures("path")
def test_the_first_of_equal_channels_wins():
    boxes, masks = torch.tensor([[0.0, 0, 39, 47], [20, 0, 63, 47]]), torch.zeros(2, 7, 7)
    masks[0] += 1  # the second one's mask is empty: it goes
    for level, inside, outside in ((2.0, 2, 0), (-2.0, VOID, 2), (0.0, 2, 0)):
        scores = torch.full((4, *SIZE), level)
        channels, semantic, _ = fuse_panoptic(scores, SIZE, boxes, torch.tensor([1, 2]), masks, 2)
        assert (semantic == 0).all()
        # Where all scores are -2, "unknown" is 0 in the box and -2 beside it, where the instance's logit is 0.
        assert (channels[:, :40] == inside).all() and (channels[:, 40:] == outside).all()


def random_case(seed):
    """Any sizes, layouts, strides, boxes and masks."""
    draw = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high + 1, (), generator=draw))

    height, width, num_stuff, things = number(1, 14), number(1, 30), number(0, 5), number(0, 4)
    stride = [1, 2, 4, 4, 4, 0.4][number(0, 5)]
    size = (max(int(height * stride), 1) + number(0, 1), max(int(width * stride), 1) + number(0, 1))
    scores = torch.randn(num_stuff + things, height, width, generator=draw) * 3
    if seed % 3 == 1:
        scores = scores[None].contiguous(memory_format=torch.channels_last)[0]
    elif seed % 3 == 2:
        scores = scores.repeat(2, 2, 2)[::2, ::2, ::2][:, :height, :width]
    count, side = number(0, 9) if things else 0, [1, 2, 7, 28, 31][number(0, 4)]
    low = torch.rand(count, 2, generator=draw) * 1.3 - 0.2
    extent = torch.rand(count, 2, generator=draw) ** 2 * 0.9 - 0.05  # a few are inside out
    boxes = torch.cat([low, low + extent], 1) * torch.tensor([size[1], size[0]] * 2)
    if seed % 4 == 0:
        boxes = (boxes * 2).round() / 2  # halves
    classes = torch.randint(1, max(things, 1) + 1, (count,), generator=draw)
    masks = torch.randn(count, side, side, generator=draw) * 3 + number(-2, 3)
    return scores, size, boxes, classes, masks, num_stuff, seed % 5 > 0


@native
def test_hundreds_of_random_cases_against_the_plain_path(monkeypatch):
    shares = []
    for seed in range(400):
        given = random_case(seed)
        found = []
        for path in VARIANTS:
            monkeypatch.setenv("UPSNET_NATIVE_CPU", path)
            found.append(fuse_panoptic(*given))
        with monkeypatch.context() as without:
            take("plain", without)
            expected = fuse_panoptic(*given)
        for variant, tensors in zip(VARIANTS, found, strict=True):
            for ours, theirs, first in zip(tensors, expected, found[0], strict=True):
                assert torch.equal(ours, theirs), (seed, variant)
                assert torch.equal(ours, first)
        shares.append((expected[0] >= given[5]).float().mean())
        shares.append((expected[0] == VOID).float().mean())
    assert min(torch.stack(shares).view(-1, 2).mean(0)) > 0.05  # instances and "unknown" win pixels


def large_case(layout=torch.contiguous_format, count=30):
    draw = torch.Generator().manual_seed(5)
    scores = torch.randn(1, 61, 50, 76, generator=draw).contiguous(memory_format=layout)[0] * 2
    centre = torch.rand(count, 2, generator=draw) * torch.tensor([303.0, 199.0])
    side = torch.exp(torch.randn(count, 2, generator=draw) * 0.8 + 3)
    boxes = torch.cat([centre - side, centre + side], 1).clamp(min=0).minimum(torch.tensor([303.0, 199, 303, 199]))
    classes = torch.randint(1, 8, (count,), generator=draw)
    return scores, (200, 304), boxes, classes, torch.randn(count, 28, 28, generator=draw) + 1, 53, True


@native
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_number_of_threads_gives_the_same(variant, monkeypatch):
    take(variant, monkeypatch)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(fuse_panoptic(*large_case()))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))
    # Layouts change nothing: the order of additions is the same.
    assert torch.equal(found[0][0], fuse_panoptic(*large_case(torch.channels_last))[0])
    take("plain", monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(found[0], fuse_panoptic(*large_case()), strict=True))


@native
def test_more_mask_bits_than_are_held_at_once():
    """40 masks over the whole map are 20 MB of bits, and 16 are formed at a time."""
    size, count = (2048, 2048), 40
    boxes, classes = torch.tensor([[0.0, 0, 2047, 2047]] * count), torch.arange(count) % 20 + 1
    kept = fuse_panoptic(torch.zeros(21, 1, 1), size, boxes, classes, torch.ones(count, 1, 1), 1)[2]
    assert kept.tolist() == [True] * 20 + [False] * 20


@native
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_do_no_harm(bad):
    scores, size, boxes, classes, masks, num_stuff, unknown = large_case()
    for tensor, places in ((scores, [(3, 7, 9), (60, 0, 0)]), (boxes, [(0, 1), (1, 2), (2, 0)]), (masks, [(4, 5, 6)])):
        for place in places:
            tensor[place] = bad
    for unlike in (classes, classes * 0, classes - 100, classes + 2**40):
        channels, semantic, kept = fuse_panoptic(scores, size, boxes, unlike, masks, num_stuff, unknown)
        assert channels.min() >= VOID and channels.max() < num_stuff + kept.sum()
        assert semantic.min() >= 0 and semantic.max() < len(scores)


@pytest.mark.usefixtures("path")
def test_half_precision_is_widened():
    scores, *others = large_case()
    half = scores.bfloat16()
    expected = fuse_panoptic(half.float(), *others)
    assert all(torch.equal(a, b) for a, b in zip(fuse_panoptic(half, *others), expected, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fuse_panoptic(half, *others)[0], expected[0])
    double = fuse_panoptic(half.double(), *others)
    assert (double[0] != expected[0]).float().mean() < 1e-3 and torch.equal(double[2], expected[2])


@native
def test_operator_checks_of_torch():
    scores, _, *others = large_case(count=4)
    for count in (0, 4):
        instances = [tensor[:count] for tensor in others[:3]]
        arguments = (scores[:, :5, :6], 20, 24, *instances, *others[3:])
        torch.library.opcheck(torch.ops.upsnet.fuse_panoptic.default, arguments)


@native
def test_autocast_leaves_float32():
    scores, size, *others = large_case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.ops.upsnet.fuse_panoptic(scores.bfloat16(), *size, *others)
    assert torch.equal(found[0], fuse_panoptic(scores.bfloat16(), size, *others)[0])


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"scores": (1, 5, 4, 4)}, "scores"),
        ({"scores": (5, 0, 4)}, "scores"),
        ({"boxes": (3, 5)}, "boxes"),
        ({"boxes": (4,)}, "boxes"),
        ({"boxes": ()}, "boxes"),
        ({"classes": (2,)}, "classes"),
        ({"mask_logits": (2, 7, 7)}, "mask_logits"),
        ({"mask_logits": (3, 7, 6)}, "mask_logits"),
        ({"mask_logits": (3, 0, 0)}, "mask_logits"),
        ({"mask_logits": (3, 1, 7, 7)}, "mask_logits"),
        ({"size": (0, 16)}, "size"),
        ({"num_stuff": 6}, "num_stuff"),
        ({"num_stuff": -1}, "num_stuff"),
        ({"scores": (40000, 1, 1)}, "num_stuff"),
    ],
)
def test_wrong_shapes_are_refused_by_name(changed, word):
    shapes = {"scores": (5, 4, 4), "boxes": (3, 4), "classes": (3,), "mask_logits": (3, 7, 7)} | changed
    given = {name: torch.zeros(shape) for name, shape in shapes.items() if name not in ("size", "num_stuff")}
    given["classes"] = given["classes"].long()
    with pytest.raises(ValueError, match=f"fuse_panoptic: {word}"):
        fuse_panoptic(
            **{"size": (16, 16), "num_stuff": 2}
            | {k: v for k, v in changed.items() if k in ("size", "num_stuff")}
            | given
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", [*range(40), "large", "large, channels last"])
def test_on_a_gpu(case):
    if isinstance(case, int):
        given = random_case(case)
    else:
        given = large_case(torch.channels_last if "last" in case else torch.contiguous_format)
    on_gpu = tuple(value.cuda() if isinstance(value, torch.Tensor) else value for value in given)
    torch.cuda.set_sync_debug_mode("error" if library.native_cuda_in_use() else "default")
    try:
        found = fuse_panoptic(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, theirs in zip(found, fuse_panoptic(*given), strict=True):
        assert (ours.cpu() != theirs).float().mean() < 1e-3
