from collections import OrderedDict

import pytest
import torch
from torch import nn

from upsnet.checkpoints.loading import load_into
from upsnet.structures.errors import WeightsError


def network():
    return nn.Sequential(OrderedDict(first=nn.Linear(2, 3), norm=nn.BatchNorm1d(3), last=nn.Linear(3, 5)))


def test_fitting_weights_go_in_whole():
    source, target = network(), network()
    report = load_into(target, source.state_dict(), "w.pth")
    assert report.left_out == report.initialised == [] and report.differences() == ""
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in target.state_dict().items())


def test_counters_of_batch_norm_may_be_absent_or_too_many():
    state = network().state_dict()
    del state["norm.num_batches_tracked"]
    report = load_into(network(), state, "w.pth")
    assert report.loaded == list(state) and report.differences() == ""
    surplus = nn.Linear(2, 3).state_dict() | {"x.num_batches_tracked": torch.tensor(1)}
    report = load_into(nn.Linear(2, 3), surplus, "w.pth")
    assert report.loaded == ["weight", "bias"] and report.differences() == ""


def test_another_network_is_refused_and_nothing_changes():
    target = network()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    del state["first.weight"], state["norm.bias"]
    state |= {f"more{i}": torch.ones(1) for i in range(5)} | {"last.weight": torch.ones(9, 3)}
    with pytest.raises(WeightsError) as caught:
        load_into(target, state, "w.pth")
    assert str(caught.value) == (
        "w.pth belongs to another network (2 missing: first.weight, norm.bias; 5 unknown here: more0, more1, more2, …; "
        "1 of another shape: last.weight (9×3, here 5×3)): use the recipe it was trained with"
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


def test_not_strict_takes_what_fits_and_lists_the_rest():
    target = network()
    state = {name: tensor + 1 for name, tensor in target.state_dict().items()}
    state["last.weight"], state["more"] = torch.ones(9, 3), torch.ones(1)
    own = target.last.weight.clone()
    del state["first.bias"]
    report = load_into(target, state, "w.pth", strict=False)
    assert report.left_out == ["last.weight", "more"] and report.initialised == ["first.bias", "last.weight"]
    assert "first.weight" in report.loaded and torch.equal(target.first.weight, state["first.weight"])
    assert torch.equal(target.last.weight, own)
