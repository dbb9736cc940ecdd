"""The counter of synchronising calls sees them, once each, and lets everything else pass."""

import pytest
import torch

from tests.syncs import count_syncs
from upsnet.operators import nms

X = torch.arange(6.0)
MASK = X > 2


def fill(x, value):
    x = x.clone()
    x[MASK] = value
    return x


CALLS = {
    "item": lambda: X[0].item(),
    "tolist": lambda: X.tolist(),
    "cpu": lambda: X.cpu(),
    "to": lambda: X.to("cpu"),
    "bool": lambda: bool(X[1] > 0),
    "int": lambda: int(X[0]),
    "float": lambda: float(X[0]),
    "index": lambda: range(torch.tensor(3)),
    "nonzero": lambda: torch.where(MASK),
    "masked_select": lambda: X.masked_select(MASK),
    "unique2": lambda: X.unique(),
    "unique_consecutive": lambda: X.unique_consecutive(),
    "equal": lambda: torch.equal(X, X),
    "bincount": lambda: X.long().bincount(),
    "repeat_interleave": lambda: X.repeat_interleave(X.long()),
    "new_tensor": lambda: X.new_tensor([1.0]),
    "tensor": lambda: torch.tensor([1.0], device=X.device),
    "index_put": lambda: fill(X, X[3:]),
}
FREE = {
    "arithmetic": lambda: (X * 2).clamp(min=1).sum(),
    "where with values": lambda: torch.where(MASK, X, -X),
    "a number through a mask": lambda: fill(X, 0),
    "gather": lambda: X[MASK.long()],
    "sort and topk": lambda: (X.sort(stable=True), X.topk(2)),
    "known length": lambda: X.repeat_interleave(X.long(), output_size=15),
    "a constant of the host": lambda: torch.tensor([1, 2]),
    "numpy": lambda: X.numpy(),
    "a layer": lambda: torch.nn.functional.conv2d(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 3, 3)),
}


@pytest.mark.parametrize("guard", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", CALLS)
def test_counted_once(name, guard):
    with guard(), count_syncs() as syncs:
        CALLS[name]()
        CALLS[name]()
    assert dict(syncs.counts) == {name: 2} and len(syncs) == 2
    assert {place.split(":")[0] for _, place in syncs.places} == {"test_syncs.py"}


@pytest.mark.parametrize("guard", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", FREE)
def test_not_counted(name, guard):
    with guard(), count_syncs() as syncs:
        FREE[name]()
    assert not len(syncs), syncs


def test_masks_in_indices():
    with count_syncs() as syncs:
        assert X[MASK].tolist() == [3, 4, 5]
    assert dict(syncs.counts) == {"index": 1, "tolist": 1}


def test_lines_of_the_package_are_named():
    boxes = torch.tensor([[0.0, 0, 5, 5], [1, 0, 5, 5]])
    with count_syncs() as syncs:
        nms(boxes, boxes[:, 0], 0.5).tolist()
    assert len(syncs) == 1 or "operators/nms.py" in repr(syncs)
    assert X.tolist() and syncs.counts["tolist"] == 1  # what comes after the block is not counted
