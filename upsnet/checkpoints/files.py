"""Reading weight files of several kinds without ever running what is in them, and putting them into a network."""

import codecs
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from upsnet.structures.categories import Categories
from upsnet.structures.errors import WeightsError

FORMAT_VERSION = 1
"""Version of our snapshots; raised when a reader of today could no longer make sense of a file."""

# The number with which torch's files before version 1.6 begin, as pickled bytes.
_LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")

# Scalars of numpy are harmless, and common in other people's files. Both homes of their constructor are named.
_SCALARS: list[Any] = [
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    (codecs.encode, "_codecs.encode"),
    np.dtype,
    *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
]

# What torch.load raises on a file that begins well and then is cut off or garbled.
_DAMAGE = (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError, IndexError, TypeError, AttributeError)


@dataclass(frozen=True, slots=True)
class WeightFile:
    """What a weight file holds.

    state: tensors by name, on the CPU, floating ones as float32. categories: in our snapshots only.
    """

    state: dict[str, Tensor]
    categories: Categories | None = None


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What became of a file's tensors.

    loaded: names that were copied. left_out: tensors of the file that were not used. initialised: tensors of the
    network that the file does not give and that stay as they were. `other_shape` maps names that are in both, and
    hence in the two latter lists, to the shapes in file and network.
    """

    loaded: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    other_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    def differences(self) -> str:
        """The first differences in words, empty if the file gave exactly what the network wants."""
        shapes = [f"{name} ({_shape(file)}, here {_shape(own)})" for name, (file, own) in self.other_shape.items()]
        missing = [name for name in self.initialised if name not in self.other_shape]
        unknown = [name for name in self.left_out if name not in self.other_shape]
        parts = [("missing", missing), ("unknown here", unknown), ("of another shape", shapes)]
        return "; ".join(f"{len(names)} {what}: {_first(names)}" for what, names in parts if names)


def read_weights(path: Path) -> WeightFile:
    """Reads a torch file (either format), one of our snapshots, or safetensors.

    A leading `module.` of names is dropped; entries that are no tensors are left out.

    Raises:
        WeightsError: the file is missing, cut off, no weight file, not safe to load, or holds NaN or infinity.
    """
    if path.suffix == ".safetensors":
        return WeightFile(_tensors(_load_safetensors(path), path))
    content = load_safely(path)
    if isinstance(content, Mapping) and {"weights", "format_version"} <= content.keys():
        if content["format_version"] > FORMAT_VERSION:
            raise WeightsError(
                f"{path} has format version {content['format_version']}, this program reads up to {FORMAT_VERSION}: "
                f"update the program"
            )
        categories = Categories.from_coco(content["categories"], str(path))
        return WeightFile(_tensors(content["weights"], path), categories)
    return WeightFile(_tensors(content, path))


def load_safely(path: Path) -> Any:
    """The content of a torch file: tensors, plain values and numpy scalars, nothing else.

    Raises:
        WeightsError: see `read_weights`.
    """
    start = _first_bytes(path)
    if not start.startswith(b"PK\x03\x04") and _LEGACY_MAGIC not in start:
        raise WeightsError(f"{path} is not a weight file: it begins with {start[:20]!r}; download or copy it again")
    try:
        with torch.serialization.safe_globals(_SCALARS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _not_readable(path, error) from error
    except _DAMAGE as error:
        unsafe = re.search(r"(?:GLOBAL|class|function) '?([\w.]+\.\w+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and unsafe:
            raise WeightsError(
                f"{path} is not loaded, because it holds more than tensors and may run code ({unsafe[1]}): "
                f"save it again as a plain dictionary of tensors"
            ) from error
        raise WeightsError(f"{path} is cut off or damaged: download or copy it again") from error


def load_into(network: nn.Module, state: Mapping[str, Tensor], source: str, strict: bool = True) -> LoadReport:
    """Copies tensors into the network's parameters and buffers of the same name and shape.

    Args:
        source: the file's name, for messages.
        strict: the two must agree in all names and shapes; `num_batches_tracked` may be absent on either side.

    Raises:
        WeightsError: strict and they do not agree; then the network is unchanged.
    """
    own = network.state_dict()
    report = LoadReport()
    for name, tensor in state.items():
        if name in own and tensor.shape == own[name].shape:
            report.loaded.append(name)
        elif not name.endswith("num_batches_tracked"):
            report.left_out.append(name)
            if name in own:
                report.other_shape[name] = tuple(tensor.shape), tuple(own[name].shape)
    loaded = set(report.loaded)
    report.initialised.extend(name for name in own if name not in loaded and not name.endswith("num_batches_tracked"))
    if strict and (difference := report.differences()):
        raise WeightsError(f"{source} belongs to another network ({difference}): use the recipe it was trained with")
    network.load_state_dict({name: state[name] for name in report.loaded}, strict=False)
    return report


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    named = content.items() if isinstance(content, Mapping) else ()
    state = {
        str(name).removeprefix("module."): tensor.detach().float() if tensor.is_floating_point() else tensor
        for name, tensor in named
        if isinstance(tensor, Tensor)
    }
    if not state:
        raise WeightsError(f"{path} holds no tensors by name: a dictionary of tensors (state_dict) is wanted")
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{path} holds NaN or infinite values in {name}: use another file")
    return state


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    _first_bytes(path)
    try:
        return safetensors.torch.load_file(path)
    except OSError as error:
        raise _not_readable(path, error) from error
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path} is cut off or no safetensors file: download or copy it again") from error


def _first_bytes(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(64)
    except FileNotFoundError as error:
        raise WeightsError(f"there is no weight file {path}: check the path, or train or download it first") from error
    except OSError as error:
        raise _not_readable(path, error) from error


def _not_readable(path: Path, error: OSError) -> WeightsError:
    return WeightsError(f"weight file {path} cannot be read ({error.strerror or error}): check the path")


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"
