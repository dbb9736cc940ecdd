"""Workers that horovodrun has started, also such that come and go; all that is known of Horovod stands here."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, TypeVar

import horovod.torch as hvd
import torch
from horovod.common.elastic import State
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

T = TypeVar("T")
Compression = Literal["none", "fp16"]


class HorovodWorkers:
    """The workers of horovodrun's environment: NCCL between GPUs where Horovod was built with it, else Gloo."""

    def __init__(self, device: torch.device, compression: Compression = "none") -> None:
        """Meets the others.

        Args:
            device: that this worker computes on.
            compression: of gradients on their way; fp16 halves the bytes and rounds.
        """
        self._on_cuda = device.type == "cuda"
        if self._on_cuda:
            torch.cuda.set_device(device)
        self._compression = _Half if compression == "fp16" else _Whole
        self._elastic = _ElasticState() if os.environ.get("HOROVOD_ELASTIC") == "1" else None
        hvd.init()

    # Workers that come and go change these.

    @property
    def rank(self) -> int:
        return int(hvd.rank())

    @property
    def local_rank(self) -> int:
        return int(hvd.local_rank())

    @property
    def count(self) -> int:
        return int(hvd.size())

    @property
    def batch_norm(self) -> type[_BatchNorm] | None:
        return hvd.SyncBatchNorm if self._on_cuda else None  # Horovod has none for CPUs

    def run(self, work: Callable[[bytes | None], T]) -> T:
        if self._elastic is None:
            return work(None)
        return hvd.elastic.run(lambda state: work(state.kept))(self._elastic)

    def share(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, accumulation: int
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        _take_those_of_rank_0(network)
        named = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
        # Its class is a subclass of the same name, so snapshots do not show who trained.
        shared = hvd.DistributedOptimizer(
            optimizer,
            named_parameters=named,
            compression=self._compression,
            backward_passes_per_step=accumulation,
            op=hvd.Sum,
        )
        shared.state = optimizer.state
        if self._elastic is not None:
            self._elastic.follow(network)
        return network, shared

    def micro_batch(self, network: nn.Module, last: bool) -> AbstractContextManager[object]:
        if self._elastic is not None:
            self._elastic.begin_step()
        return nullcontext()  # the optimiser counts the passes

    def finish_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.synchronize()  # type: ignore[attr-defined]

    @contextmanager
    def stepping(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        with optimizer.skip_synchronize():  # type: ignore[attr-defined]
            yield
        if self._elastic is not None:
            self._elastic.stepped()

    def end_step(self, keep: Callable[[], bytes]) -> None:
        if self._elastic is not None:
            self._elastic.end_step(keep)

    # Named by their purpose: the names that Horovod gives count calls, of which a newcomer has made fewer.

    def gather(self, value: T) -> list[T]:
        values: list[T] = hvd.allgather_object(value, name="gather")
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        total: Tensor = hvd.allreduce(tensor, op=hvd.Sum, name="sum")
        return total

    def close(self) -> None:
        hvd.shutdown()


# Horovod wants memory without gaps in the order of dimensions; convolutions' weights and gradients have their channels
# innermost.


def _in_order(tensor: Tensor) -> Tensor:
    return (tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor).contiguous()


def _back(ordered: Tensor) -> Tensor:
    return ordered.permute(0, 3, 1, 2) if ordered.dim() == 4 else ordered


@torch.no_grad()
def _take_those_of_rank_0(network: nn.Module) -> None:
    tensors = network.state_dict()
    ordered = {name: _in_order(tensor) for name, tensor in tensors.items()}
    hvd.broadcast_parameters(ordered, root_rank=0)
    for name, tensor in tensors.items():
        tensor.copy_(_back(ordered[name]))


class _Whole:
    """A gradient on its way, as Horovod's optimiser asks for it."""

    @staticmethod
    def compress(gradient: Tensor) -> tuple[Tensor, torch.dtype]:
        return _in_order(gradient), gradient.dtype

    @staticmethod
    def decompress(total: Tensor, dtype: torch.dtype) -> Tensor:
        return _back(total.to(dtype))


class _Half(_Whole):
    @staticmethod
    def compress(gradient: Tensor) -> tuple[Tensor, torch.dtype]:
        return _in_order(gradient).half(), gradient.dtype


class _ElasticState(State):
    """What goes on when workers come, go or die: the work as the last whole step left it.

    Weights and optimiser change only after all messages of a step have arrived, without another one in between. So
    whoever misses a message still has those of the last step, and none need be copied in each; but for running
    statistics, which passes change.
    """

    def __init__(self) -> None:
        super().__init__(bcast_object=hvd.broadcast_object, get_rank=hvd.rank)
        self.kept: bytes | None = None
        self._keep: Callable[[], bytes] | None = None
        self._network: nn.Module | None = None
        self._buffers: list[Tensor] = []

    def follow(self, network: nn.Module) -> None:
        self._network = network

    def begin_step(self) -> None:
        if self._network is not None and not self._buffers:
            self._buffers = [buffer.clone() for buffer in self._network.buffers()]

    def stepped(self) -> None:
        self._buffers = []

    def end_step(self, keep: Callable[[], bytes]) -> None:
        self._keep = keep
        self.check_host_updates()

    # What Horovod calls: after a failure `restore`; then `reset`, when the others are met anew; then `sync`, unless
    # workers have only gone. The first rank is always one that was there before.

    def save(self) -> None:
        pass

    def restore(self) -> None:
        if self._network is not None and self._buffers:
            for buffer, before in zip(self._network.buffers(), self._buffers, strict=True):
                buffer.copy_(before)

    def reset(self) -> None:
        if self._keep is not None:
            self.kept = self._keep()
        self._keep, self._network, self._buffers = None, None, []

    def sync(self) -> None:
        self.kept = hvd.broadcast_object(self.kept, root_rank=0, name="state")
