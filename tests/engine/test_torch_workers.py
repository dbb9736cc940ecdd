"""torch.distributed between two processes of this machine, by Gloo."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tests.engine.toy import OPTIONS, Toy, batches, same_weights
from tests.processes import run_workers
from upsnet.engine.optimizer import build_optimizer
from upsnet.engine.torch_workers import meeting_place
from upsnet.engine.train import train

TRAINING = """
import json, sys
from dataclasses import replace
import torch
from tests.engine.test_workers import share_of
from tests.engine.toy import OPTIONS, Toy
from upsnet.engine.optimizer import build_optimizer
from upsnet.engine.torch_workers import TorchWorkers
from upsnet.engine.train import train

workers = TorchWorkers(torch.device("cpu"))
network = Toy(dropout=0.3)  # drawn anew in each step, by images
if workers.rank == 1:  # the weights of rank 0 count
    with torch.no_grad():
        network.conv.bias.add_(1)
options = replace(OPTIONS, accumulation=2)
train(network, share_of(workers, 1), build_optimizer(network), options, workers=workers)
torch.save(network.state_dict(), f"{sys.argv[1]}/{workers.rank}.pth")
gathered = workers.gather({"rank": workers.rank})
total = workers.sum(torch.tensor([1.0, workers.rank])).tolist()
print(json.dumps([workers.count, workers.local_rank, gathered, total]))
workers.close()
"""


def test_two_processes_train_like_one(tmp_path):
    printed = [json.loads(text) for text in run_workers(2, TRAINING, tmp_path)]
    assert printed == [[2, rank, [{"rank": 0}, {"rank": 1}], [2.0, 1.0]] for rank in range(2)]
    first, second = (_loaded(tmp_path / f"{rank}.pth") for rank in range(2))
    assert same_weights(first, second)
    alone = Toy(dropout=0.3)
    train(alone, batches(1), build_optimizer(alone), replace(OPTIONS, accumulation=4))
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(first.state_dict()[name], tensor, rtol=0, atol=1e-5)


def test_workers_that_come_after_others_do_not_find_what_those_have_left():
    """As after a restart by torchrun, which keeps its store; the first set dies while it meets."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=30))
    for other in (1, 2):
        store.set(f"upsnet/present/{other}", "of a worker that is gone")
    for left in ("first", "second"):
        with ThreadPoolExecutor(3) as pool:
            places = list(pool.map(lambda rank: meeting_place(store, rank, 3), (0, 1, 2)))
        assert not any(place.check(["address"]) for place in places)
        places[0].set("address", left)
        assert [place.get("address").decode() for place in places] == [left] * 3


def test_a_worker_that_does_not_come_is_named():
    with pytest.raises(TimeoutError, match=r"have not come: \[1\]"):
        meeting_place(dist.HashStore(), 0, 2, patience=0.1)


def _loaded(path):
    network = Toy()
    network.load_state_dict(torch.load(path, weights_only=True))
    return network
