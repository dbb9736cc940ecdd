"""`python -m upsnet.operators`: it names every operator's path, passes here, and notices a wrong one."""

import pytest
import torch

from upsnet.operators import __main__ as self_check
from upsnet.operators import library


def test_every_operator_is_checked():
    checked = {check.native for check in self_check.CHECKS.values()}
    assert checked - {"count_overlaps"} == {name for name in library.COVERED if not name.endswith("_backward")}


def test_it_passes_and_names_the_paths(capsys):
    assert self_check.main() == 0
    printed = capsys.readouterr().out
    assert library.describe() in printed and "self-check passed" in printed
    for name, check in self_check.CHECKS.items():
        assert f"cpu   {name:18s} {self_check.path_of(check, 'cpu')} " in printed


def test_paths_follow_what_is_in_use(monkeypatch):
    monkeypatch.setattr(library, "NOT_IN_USE_BECAUSE", "not built")
    monkeypatch.setattr(library, "count_overlaps", None)
    paths = {name: self_check.path_of(check, "cpu") for name, check in self_check.CHECKS.items()}
    assert paths == {name: check.fallback for name, check in self_check.CHECKS.items()}


WRONG = {
    "deform_conv2d": lambda operator: lambda *a, **k: operator(*a, **k) * 1.001,
    "pyramid_roi_align": lambda operator: lambda *a, **k: operator(*a, **k, aligned=True),
    "batched_nms": lambda operator: lambda *a, **k: operator(*a, **k)[1:],
    "fuse_panoptic": lambda operator: lambda *a, **k: [maps.roll(1, -1) for maps in operator(*a, **k)],
    "paste_masks": lambda operator: lambda masks, *a: operator(torch.zeros_like(masks), *a),
    "caffe_sgd_": lambda operator: lambda *a: operator(*a[:4], 0.8, a[5]),
    "count_overlaps": lambda operator: lambda first, second: operator(second, first),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_operator_is_noticed(name, monkeypatch, capsys):
    monkeypatch.setattr(self_check, name, WRONG[name](getattr(self_check, name)))
    assert self_check.main() == 1
    assert "self-check FAILED" in capsys.readouterr().out
