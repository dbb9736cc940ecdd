"""Optimisers, and the groups in which they treat parameters: by kind, whatever the network is."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from upsnet.operators import caffe_sgd_

OptimizerKind = Literal["sgd", "adamw"]

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)


def parameter_groups(network: nn.Module, weight_decay: float, bias_factor: float) -> list[dict[str, Any]]:
    """Sorts the trainable parameters by kind; a frozen parameter (`requires_grad` false) is in no group.

    Every group has `factor`, by which its learning rate differs from the schedule's: norm parameters (1, no decay),
    weights (1, `weight_decay`), biases (`bias_factor`, no decay). Empty groups are left out.
    """
    by_kind: dict[str, list[nn.Parameter]] = {"norm": [], "weight": [], "bias": []}
    seen: set[int] = set()
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kind = "norm" if isinstance(module, NORMS) else "bias" if "bias" in name else "weight"
            by_kind[kind].append(parameter)
    return [
        {
            "params": parameters,
            "kind": kind,
            "factor": bias_factor if kind == "bias" else 1.0,
            "weight_decay": weight_decay if kind == "weight" else 0.0,
        }
        for kind, parameters in by_kind.items()
        if parameters
    ]


class CaffeSGD(torch.optim.Optimizer):
    """SGD with momentum in the form of Caffe: the learning rate lies inside the buffer.

    v ← m·v + lr·(∇w + wd·w);  w ← w - v

    A change of the rate therefore acts with delay; `divide_momentum` makes up for it. torch.optim.SGD keeps the rate
    outside of the buffer: equal as long as the rate does not change, not during warm-up and after decays.
    """

    def __init__(
        self, params: Iterable[Any], momentum: float = 0.9, lr: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update with the gradients at hand; parameters without a gradient and their buffers stay as they are."""
        for group in self.param_groups:
            reached: list[tuple[Tensor, Tensor]] = [(p, p.grad) for p in group["params"] if p.grad is not None]
            if not reached:
                continue
            parameters, gradients = map(list, zip(*reached, strict=True))
            buffers = [self._buffer(p) for p in parameters]
            caffe_sgd_(parameters, gradients, buffers, group["lr"], group["momentum"], group["weight_decay"])

    @torch.no_grad()
    def divide_momentum(self, divisor: float) -> None:
        """Divides all buffers, to be called when the rate drops by the same divisor."""
        buffers = [state["momentum_buffer"] for state in self.state.values()]
        if buffers:
            torch._foreach_div_(buffers, divisor)

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def build_optimizer(
    network: nn.Module, kind: OptimizerKind = "sgd", momentum: float = 0.9, weight_decay: float = 1e-4
) -> torch.optim.Optimizer:
    """The optimiser over the network's trainable parameters; the rate is set by `set_learning_rate` before each step.

    sgd: `CaffeSGD`, biases at twice the rate. adamw: torch's AdamW (`momentum` is not used), biases at the same rate.
    """
    if kind == "sgd":
        return CaffeSGD(parameter_groups(network, weight_decay, bias_factor=2.0), momentum)
    return torch.optim.AdamW(parameter_groups(network, weight_decay, bias_factor=1.0), fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives every group the rate times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
