"""Workers that torchrun has started: torch.distributed with NCCL between GPUs, Gloo between CPUs."""

import os
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


class TorchWorkers:
    """The workers of torchrun's environment, which names ranks and the place to meet."""

    def __init__(self, device: torch.device) -> None:
        """Meets the others.

        Args:
            device: that this worker computes on.
        """
        self.rank, self.count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ["LOCAL_RANK"])
        on_cuda = device.type == "cuda"
        self.batch_norm: type[_BatchNorm] | None = nn.SyncBatchNorm if on_cuda else None  # torch has none for CPUs
        store, rank, count = next(rendezvous("env://"))
        dist.init_process_group(
            # Python objects travel by Gloo in any case, so that nothing is asked of a GPU for them.
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
            store=meeting_place(store, rank, count),
            rank=rank,
            world_size=count,
            device_id=device if on_cuda else None,
        )

    def run(self, work: Callable[[bytes | None], T]) -> T:
        return work(None)  # torchrun starts all workers anew when one is lost

    def share(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, accumulation: int
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        # The first is about a name, whose successor torch 2.11 does not know; the second about strides of dimensions
        # with one element.
        for message in ("`broadcast_buffers` is deprecated", "Grad strides do not match bucket view strides"):
            warnings.filterwarnings("ignore", message)
        # Statistics of norms stay each worker's own, as in the original; `network.use_syncbn` makes them common.
        shared = DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
        shared.register_comm_hook(None, _sum)
        return shared, optimizer

    def micro_batch(self, network: nn.Module, last: bool) -> AbstractContextManager[object]:
        assert isinstance(network, DistributedDataParallel)
        return nullcontext() if last else network.no_sync()

    def finish_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        pass  # the last backward pass has waited

    def stepping(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[object]:
        return nullcontext()

    def end_step(self, keep: Callable[[], bytes]) -> None:
        pass

    def gather(self, value: T) -> list[T]:
        values: list[T] = [value] * self.count
        dist.all_gather_object(values, value)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    def close(self) -> None:
        dist.destroy_process_group()


def meeting_place(store: Store, rank: int, count: int, patience: float = 600) -> Store:
    """A part of torchrun's store that only these `count` workers know.

    torchrun keeps its store when it starts workers anew, with what those before them have left in it: addresses that
    nobody answers at. So rank 0 names a new part to every worker that is there to confirm it.

    Raises:
        TimeoutError: a worker has not come within `patience` seconds.
    """
    own = uuid4().hex
    if rank > 0:
        store.set(f"upsnet/present/{rank}", own)
        part = store.get(f"upsnet/part of/{own}").decode()  # waits
        store.set(f"upsnet/{part}/{rank}", "")
        return PrefixStore(part, store)
    missing, deadline = set(range(1, count)), time.monotonic() + patience
    while missing:
        for other in list(missing):
            if store.check([f"upsnet/present/{other}"]):
                store.set(f"upsnet/part of/{store.get(f'upsnet/present/{other}').decode()}", own)
            if store.check([f"upsnet/{own}/{other}"]):
                missing.remove(other)
        if time.monotonic() > deadline:
            raise TimeoutError(f"these workers have not come: {sorted(missing)}")
        time.sleep(0.01)
    return PrefixStore(own, store)


def _sum(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])
