import numpy as np
import pytest

from tests.reference.labels import segment_summary
from upsnet.structures.results import segments_of


@pytest.mark.parametrize("seed", range(4))
def test_areas_and_boxes_equal_the_slow_twin(seed):
    draws = np.random.default_rng(seed)
    segment_map = np.kron(draws.choice([0, 1, 300, 70000], (6, 9)), np.ones((3, 5), dtype=int)).astype(np.int32)
    segments = segments_of(segment_map, {1: 4, 300: 2, 70000: 4}, {300: 0.5})
    slow = segment_summary(segment_map)
    slow.pop(0, None)
    assert [s.id for s in segments] == sorted(slow)
    assert {s.id: (s.area, s.bbox) for s in segments} == slow
    assert {s.id: s.score for s in segments}.get(300, 0.5) == 0.5
    assert all(s.semantic_id == {1: 4, 300: 2, 70000: 4}[s.id] for s in segments)


def test_a_single_pixel_and_an_empty_map():
    segment_map = np.zeros((4, 5), dtype=np.int32)
    assert segments_of(segment_map, {}) == []
    segment_map[3, 4] = 9
    (only,) = segments_of(segment_map, {9: 1})
    assert (only.area, only.bbox, only.score) == (1, (4, 3, 1, 1), None)
