"""Batch norm over the images of all workers in place of each worker's own."""

from typing import TypeGuard

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def share_norms(network: nn.Module, kind: type[_BatchNorm]) -> None:
    """Replaces the trained batch norms of a network; parameters and statistics are those that were there.

    Args:
        kind: what takes their place; see `Workers.batch_norm`.
    """
    for module in list(network.modules()):
        for name, norm in list(module.named_children()):
            if is_own_norm(norm):
                shared = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
                for own, tensor in (*norm.named_parameters(), *norm.named_buffers()):
                    setattr(shared, own, tensor)
                setattr(module, name, shared.train(norm.training))


def is_own_norm(module: nn.Module) -> TypeGuard[_BatchNorm]:
    """Whether it is a batch norm whose statistics move with a worker's own images; frozen ones are of another class."""
    return type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
