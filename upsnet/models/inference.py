"""The form of a network that only predicts: less to compute, in the order in which the machine likes it.

Batch norm is folded into the layer before it (Ioffe and Szegedy 2015, section 3.1, at inference), convolutions take
what follows them along, weights have their precision and order once and for all. Results stay the same up to rounding.
"""

import copy
import logging
import re
from typing import Any

import torch
from torch import nn

from upsnet.models.box_head import POOLED_SIZE, BoxHead
from upsnet.models.dense import CompiledDense, RecordedDense
from upsnet.models.layers import DeformConv2d, FusedConv, FusedLinear, constant
from upsnet.models.mask_head import MaskHead, cells_of
from upsnet.models.upsnet import UPSNet

logger = logging.getLogger("upsnet")

Layer = nn.Conv2d | nn.Linear | DeformConv2d


def prepare(
    network: UPSNet, dtype: torch.dtype = torch.float32, compiled: bool = False, cuda_graph: bool = False
) -> UPSNet:
    """A network that predicts what the given one predicts, faster. The given one stays as it is.

    The new one shares the tensors that it can. It cannot learn, and its weights have other names and shapes. It follows
    some later changes of the given one's weights and not others: after a change, prepare anew.

    Args:
        network: in evaluation mode, on its device.
        dtype: of weights and products. The rest follows it under autocast, without which all of it must be float32.
        compiled: its dense part goes through `torch.compile`.
        cuda_graph: its dense part is recorded for sizes that come again; on a CPU a warning says that it is not.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    prepared = copy.deepcopy(network, shared)
    for module in list(prepared.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, Layer):
                _fold_norm(module, name, layer)
                setattr(module, name, _prepared(module, name, layer, dtype))
            elif isinstance(module, MaskHead) and isinstance(layer, nn.ConvTranspose2d):
                weight, bias = cells_of(layer)
                setattr(module, name, FusedConv(weight.to(dtype), bias, (1, 1), (0, 0)))
    # The instance's attribute comes before the method of its class.
    if compiled:
        vars(prepared)["features"] = CompiledDense(prepared.features)
    if cuda_graph and next(network.parameters()).is_cuda:
        vars(prepared)["features"] = RecordedDense(prepared.features)
    elif cuda_graph:
        logger.warning("test.cuda_graph: only a CUDA device records graphs; the CPU predicts as ever")
    return prepared


def _fold_norm(module: nn.Module, name: str, layer: Layer) -> None:
    """Gives a layer the batch norm that follows it, if one does: `norm2` follows `conv2`, `norm6` follows `fc6`."""
    norm_name = re.sub(r"^(conv|fc)(?=\d?$)", "norm", name)
    norm = getattr(module, norm_name, None)
    if not isinstance(norm, nn.BatchNorm2d):
        return
    assert norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        bias = norm.bias - norm.running_mean * factor
        if layer.bias is not None:
            bias += layer.bias * factor
        weight = layer.weight * factor.view(-1, *[1] * (layer.weight.dim() - 1))
    layer.weight, layer.bias = constant(weight), constant(bias)
    setattr(module, norm_name, nn.Identity())


def _prepared(module: nn.Module, name: str, layer: Layer, dtype: torch.dtype) -> nn.Module:
    """What stands in for a layer."""
    if isinstance(layer, DeformConv2d):
        return layer
    weight = layer.weight.to(dtype)
    if isinstance(layer, nn.Linear):
        if isinstance(module, BoxHead) and name == "fc6":
            weight = weight.view(len(weight), -1, POOLED_SIZE, POOLED_SIZE).permute(0, 2, 3, 1).flatten(1)
        return FusedLinear(weight, layer.bias)
    if name != "score":
        return FusedConv(weight, layer.bias, _pair(layer.stride), _pair(layer.padding))
    # Rows and columns of scores are asked for one by one.
    layer.weight, layer.bias = constant(weight), None if layer.bias is None else constant(layer.bias.to(dtype))
    return layer


def _pair(value: Any) -> tuple[int, int]:
    height, width = value
    return height, width
