import importlib

import numpy as np
import pytest

from tests.reference.panoptic_quality import slow_overlaps
from upsnet.operators import count_overlaps, library
from upsnet.operators.overlaps import count_overlaps_numpy

EXTREMES = [0, 1, -1, 2**24 - 1, 2**24, 2**31 - 1, -(2**31)]


@pytest.fixture(params=["native", "numpy"])
def path(request, monkeypatch):
    """Both paths, whatever this process has loaded."""
    if request.param == "numpy":
        monkeypatch.setattr(library, "count_overlaps", None)
    elif library.count_overlaps is None:
        pytest.skip(library.COUNTING_NOT_IN_USE_BECAUSE)
    return request.param


def rows(first, second):
    """The overlaps as the twin gives them, after a look at the areas."""
    pixels, *areas = count_overlaps(first, second)
    for area, label_map in zip(areas, (first, second), strict=True):
        ids, counts = np.unique(label_map, return_counts=True)
        assert area == dict(zip(ids.tolist(), counts.tolist(), strict=True))
    return [(*pair, count) for pair, count in pixels.items()]


def random_map(draws, shape, ids, run):
    """Runs of about `run` pixels; they begin anywhere and go on in the next row."""
    changes = np.cumsum(draws.random(shape[0] * shape[1]) < 1 / run)
    return draws.choice(ids, changes[-1] + 1 if changes.size else 0)[changes].astype(np.int32).reshape(shape)


@pytest.mark.parametrize("seed", range(30))
def test_equals_slow_twin(path, seed):
    draws = np.random.default_rng(seed)
    shape = tuple(draws.integers(1, 90, 2))
    ids = np.concatenate([EXTREMES, draws.integers(-(2**31), 2**31, draws.integers(1, 30))])
    first, second = (random_map(draws, shape, ids, draws.choice([1, 2, 7, 60, 5000])) for _ in range(2))
    assert rows(first, second) == slow_overlaps(first, second)


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 10, 2047, 2048, 2049, 2050, 2056, 2057, 4096, 4097, 4098])
def test_every_place_where_a_run_may_end(path, size):
    """Blocks of 2048 pixels and words of 8 must not be seen in the counts."""
    for end in {0, 1, 2, 7, 8, 9, size // 2, size - 9, size - 8, size - 2, size - 1, size} & set(range(size + 1)):
        first, second = np.zeros((1, size), np.int32), np.full((1, size), 5, np.int32)
        first[0, :end] = 3
        assert rows(first, second) == [row for row in [(0, 5, size - end), (3, 5, end)] if row[2]]


def test_every_pixel_another_pair(path):
    """The table grows many times; keys that differ in high or low bits only do not meet."""
    y, x = np.mgrid[:300, :200].astype(np.int32)
    for first, second in ((y, x), (y << 20, x << 20), (y * 200 + x, -y), (-y, y * 200 + x)):
        pixels, _, _ = count_overlaps(first, second)
        assert list(pixels) == sorted(zip(first.ravel().tolist(), second.ravel().tolist(), strict=True))
        assert set(pixels.values()) == {1} and len(pixels) == 300 * 200


def test_empty_maps(path):
    for shape in ((0, 0), (0, 5), (5, 0)):
        assert rows(np.zeros(shape, np.int32), np.zeros(shape, np.int32)) == []


def test_any_layout_is_read_and_none_is_written(path):
    draws = np.random.default_rng(1)
    first, second = draws.integers(0, 3, (2, 40, 60), dtype=np.int32)
    expected = slow_overlaps(first, second)
    first.flags.writeable = second.flags.writeable = False
    assert rows(first, second) == expected
    assert rows(np.asfortranarray(first), second) == expected
    assert rows(first[::-1, ::-1], second[::-1, ::-1]) == expected
    assert rows(first[:, ::2], second[:, ::2]) == slow_overlaps(first[:, ::2], second[:, ::2])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (np.zeros((2, 3), np.int32), np.zeros((3, 2), np.int32)),
        (np.zeros((2, 3), np.int32), np.zeros((2, 4), np.int32)),
        (np.zeros((2, 3), np.int64), np.zeros((2, 3), np.int64)),
        (np.zeros((2, 3), np.int32), np.zeros((2, 3), np.uint8)),
    ],
)
def test_other_maps_are_refused(path, first, second):
    with pytest.raises(ValueError, match="two int32 maps of one shape"):
        count_overlaps(first, second)


def test_flat_maps_of_two_sizes_are_refused_by_the_native_code():
    if library.count_overlaps is None:
        pytest.skip(library.COUNTING_NOT_IN_USE_BECAUSE)
    with pytest.raises(ValueError, match="3 and 2 pixels"):
        library.count_overlaps(np.zeros(3, np.int32), np.zeros(2, np.int32))


def test_both_paths_give_plain_integers_in_one_order():
    if library.count_overlaps is None:
        pytest.skip(library.COUNTING_NOT_IN_USE_BECAUSE)
    first, second = np.random.default_rng(0).choice(EXTREMES, (2, 500)).astype(np.int32)
    native, plain = library.count_overlaps(first, second), count_overlaps_numpy(first, second)
    assert native == plain and list(native[0]) == list(plain[0]) == sorted(native[0])
    for counts in (*native[1:], *plain[1:]):
        assert all(type(number) is int for row in counts.items() for number in row)


def test_switched_off_and_missing(monkeypatch):
    monkeypatch.setenv("UPSNET_NATIVE", "0")
    assert library._load_counting() == (None, "switched off by UPSNET_NATIVE=0")
    monkeypatch.delenv("UPSNET_NATIVE")
    for error, words in ((ModuleNotFoundError("none"), "not built"), (ImportError("broken"), "does not load: broken")):

        def refuse(name, error=error):
            raise error

        monkeypatch.setattr(importlib, "import_module", refuse)
        counting, reason = library._load_counting()
        assert counting is None and words in reason
        monkeypatch.setattr(library, "count_overlaps", counting)
        monkeypatch.setattr(library, "COUNTING_NOT_IN_USE_BECAUSE", reason)
        assert reason in library.describe_counting() and "numpy serves" in library.describe_counting()
