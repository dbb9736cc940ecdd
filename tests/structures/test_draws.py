import torch

from upsnet.structures.draws import SeededDraws, seed_of


def test_the_same_key_gives_the_same_draws():
    candidates = torch.arange(100, 200)
    assert torch.equal(SeededDraws(1, 2, 3).choose(candidates, 10), SeededDraws(1, 2, 3).choose(candidates, 10))


def test_other_keys_give_other_draws():
    keys = [(1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3), (1, 23), (12, 3), (1, 2, 3, 0)]
    assert len({seed_of(*key) for key in keys}) == len(keys)
    rows = {tuple(SeededDraws(*key).choose(torch.arange(50), 20).tolist()) for key in keys}
    assert len(rows) == len(keys)


def test_choice_is_without_replacement_and_from_the_candidates():
    chosen = SeededDraws(5).choose(torch.tensor([3, 5, 8, 13]), 4)
    assert sorted(chosen.tolist()) == [3, 5, 8, 13]
    assert len(SeededDraws(5).choose(torch.tensor([1, 2]), 0)) == 0


def test_integers_cover_their_range():
    assert {SeededDraws(9, step).integer(7) for step in range(200)} == set(range(7))


def test_the_seed_is_fixed_for_good():
    assert seed_of(235, 0) == 2110634226911640836
    assert 0 <= seed_of(-1) < 2**63
