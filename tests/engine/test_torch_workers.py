"""torch.distributed between two processes of this machine, by Gloo."""

import json
from dataclasses import replace

import torch

from tests.engine.toy import OPTIONS, Toy, batches, same_weights
from tests.processes import run_workers
from upsnet.engine.optimizer import build_optimizer
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


def _loaded(path):
    network = Toy()
    network.load_state_dict(torch.load(path, weights_only=True))
    return network
