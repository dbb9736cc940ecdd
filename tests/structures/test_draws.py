import pytest
import torch

from upsnet.structures.draws import SeededDraws, seed_of

EVERY = torch.ones(100, dtype=torch.bool)


def test_the_same_key_gives_the_same_draws():
    first, second = SeededDraws(1, 2, 3), SeededDraws(1, 2, 3)
    choices = [draws.first(EVERY, 10).tolist() for draws in (first, second, first, second)]
    assert choices[0] == choices[1] != choices[2] == choices[3]


def test_other_keys_give_other_draws():
    keys = [(1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3), (1, 23), (12, 3), (1, 2, 3, 0)]
    assert len({seed_of(*key) for key in keys}) == len(keys)
    rows = {tuple(SeededDraws(*key).first(EVERY, 20).tolist()) for key in keys}
    assert len(rows) == len(keys)


@pytest.mark.parametrize("size", [0, 1, 3, 4, 6, 8, 20])
def test_the_eligible_come_first_and_every_position_once(size):
    eligible = torch.tensor([0, 1, 0, 0, 1, 1, 0, 1]).bool()
    chosen = SeededDraws(5).first(eligible, size)
    assert len(chosen) == len(chosen.unique()) == min(size, 8) and chosen.dtype == torch.int64
    assert eligible[chosen[:4]].all() and not eligible[chosen[4:]].any()
    assert SeededDraws(5).first(eligible[:0], size).shape == (0,)


def test_every_order_is_drawn():
    three = torch.tensor([False, True, True, True])
    orders = [tuple(SeededDraws(seed).first(three, 2).tolist()) for seed in range(300)]
    counts = [orders.count((a, b)) for a in (1, 2, 3) for b in (1, 2, 3) if a != b]
    assert sum(counts) == 300 and min(counts) > 30


def test_a_choice_depends_on_the_row_of_the_eligible_alone():
    """So padding, which adds positions that are not eligible, changes nothing that is drawn, now or later."""
    draws, padded = SeededDraws(7), SeededDraws(7)
    for count in (40, 5, 100):
        places = torch.randperm(500, generator=torch.Generator().manual_seed(count))[:count].sort().values
        eligible = torch.zeros(500, dtype=torch.bool)
        eligible[places] = True
        assert torch.equal(places[draws.first(EVERY[:count], count)], padded.first(eligible, count))


def test_integers_cover_their_range():
    assert {SeededDraws(9, step).integer(7) for step in range(200)} == set(range(7))


def test_the_seed_is_fixed_for_good():
    assert seed_of(235, 0) == 2110634226911640836
    assert 0 <= seed_of(-1) < 2**63
