"""Pretrained weights to start training from: ResNets under their usual names, or our own snapshots."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from upsnet.checkpoints.files import LoadReport, load_into, read_weights
from upsnet.structures.errors import WeightsError

_STEM = {"conv1": "stem.conv", "bn1": "stem.norm"}
_SHORTCUT = {"downsample.0": "downsample.conv", "downsample.1": "downsample.norm"}


def is_resnet(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the names of a caffe or torchvision ResNet."""
    return "conv1.weight" in state and "layer1.0.conv1.weight" in state


def resnet_name(name: str) -> str | None:
    """Our name of a caffe or torchvision ResNet's tensor: `layer1.0.bn2.bias` → `res2.0.norm2.bias`.

    None for what a backbone does not have: the classifier `fc` and the counters `num_batches_tracked`. Names that such
    a ResNet does not know stay as they are.
    """
    layer, _, kind = name.rpartition(".")
    if layer == "fc" or kind == "num_batches_tracked":
        return None
    if layer in _STEM:
        return f"{_STEM[layer]}.{kind}"
    if match := re.fullmatch(r"layer([1-4])\.(\d+)\.(.+)", layer):
        part = match[3]
        part = _SHORTCUT.get(part, re.sub(r"^bn(\d)$", r"norm\1", part))
        return f"res{int(match[1]) + 1}.{match[2]}.{part}.{kind}"
    return name


def load_pretrained(network: nn.Module, path: Path) -> LoadReport:
    """Starts a network, or a backbone alone, from a file.

    The tensors of a ResNet must all find their place in the backbone; offsets of deformable layers, which no such file
    has, stay initialised. Of a snapshot of ours, everything goes in that fits by name and shape: layers that depend on
    the classes stay initialised where the counts differ. The report lists both.

    Raises:
        WeightsError: the file cannot be read, is a ResNet of another depth, or has nothing in common with the network.
    """
    state = read_weights(path).state
    backbone = getattr(network, "backbone", network)
    if is_resnet(state):
        prefix = "" if backbone is network else "backbone."
        named = {f"{prefix}{ours}": state[name] for name in state if (ours := resnet_name(name)) is not None}
        _check_backbone(backbone, {name.removeprefix(prefix): tensor for name, tensor in named.items()}, path)
        return load_into(network, named, str(path), strict=False)
    if backbone is network:
        state = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    report = load_into(network, state, str(path), strict=False)
    if not report.loaded:
        raise WeightsError(f"{path} has nothing in common with this network ({report.differences()}): use another file")
    return report


def _check_backbone(backbone: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    own = backbone.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    wrong = [name for name in missing if ".offset." not in name]
    wrong += [name for name in state if name not in own or state[name].shape != own[name].shape]
    if wrong:
        raise WeightsError(
            f"{path} is not the ResNet of this recipe ({len(wrong)} layers differ, the first is {wrong[0]}): "
            f"set symbol to the file's depth or network.pretrained to another file"
        )
