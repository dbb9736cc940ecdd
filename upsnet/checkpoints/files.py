"""Reading weight files of several kinds without ever running what is in them."""

import codecs
import json
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from upsnet.checkpoints import released, resnet
from upsnet.checkpoints.manifest import known_file
from upsnet.structures.categories import Categories
from upsnet.structures.errors import WeightsError

FORMAT_VERSION = 1
"""Version of our files; raised when a reader of today could no longer make sense of one."""

RECORD = "upsnet"
"""Entry of a safetensors file's metadata that holds, as json, what a snapshot keeps beside its weights."""

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
_DAMAGE = (
    zipfile.BadZipFile, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError, IndexError, TypeError,
    AttributeError,
)  # fmt: skip

_WRAPPERS = ("state_dict", "model")
"""Entries under which others keep the weights."""


class Kind(StrEnum):
    """Whose names the tensors of a file bore."""

    RELEASED = "UPSNet, as released"
    OURS = "UPSNet, ours"
    RESNET = "ResNet"
    UNKNOWN = "unknown"


_LANDMARKS = {
    "resnet_backbone.conv1.conv1.weight": Kind.RELEASED,
    "backbone.stem.conv.weight": Kind.OURS,
    "layer1.0.conv1.weight": Kind.RESNET,
}
"""A name that only files of that kind have."""


@dataclass(frozen=True, slots=True)
class WeightFile:
    """What a weight file holds.

    Attributes:
        state: tensors by our names, on the CPU, floating ones as float32; names that we do not know stay as they are.
        format: the container: torch, torch before 1.6, safetensors.
        dtypes: how many tensors are stored as what, by the names of torch.
        categories: of ours what is stored inside; of released files what their class counts tell.
        recipe, iteration: of our snapshots, yaml text and training step.
        convention: what a ResNet's file itself says of its convention, see `conventions.py`.
    """

    path: Path
    kind: Kind
    state: dict[str, Tensor]
    format: str
    dtypes: dict[str, int]
    categories: Categories | None = None
    recipe: str | None = None
    iteration: int | None = None
    convention: str | None = None

    @property
    def class_counts(self) -> tuple[int, int] | None:
        """C and S of an UPSNet: rows of the box head's and the semantic head's classifiers."""
        return _class_counts(self.state)


def read_weights(path: Path) -> WeightFile:
    """Reads a weight file: of torch, in either format, or safetensors; an entry `state_dict` or `model` is opened.

    Which kind it is shows in the tensors' names. A leading `module.` of names is dropped; entries that are no tensors
    are left out, and so are a ResNet's classifier and its counters.

    Raises:
        WeightsError: the file is missing, cut off, no weight file, not safe to load, or holds NaN or infinity.
    """
    content, container = _load(path)
    entries: Mapping[str, Any] = content if isinstance(content, Mapping) else {}
    record = _record(entries, path)
    tensors, dtypes = _tensors(record.get("weights", _unwrapped(entries)), path)
    kind, categories = _kind(tensors), None
    if kind is Kind.RELEASED:
        tensors = {released.our_name(name) or name: tensor for name, tensor in tensors.items()}
        categories = released.released_classes(_class_counts(tensors))
    elif kind is Kind.RESNET:
        tensors = resnet.to_ours(tensors)
    if record.get("categories") is not None:
        categories = Categories.from_coco(record["categories"], str(path))
    convention = str(entries["convention"]) if "convention" in entries else None
    recipe, iteration = record.get("recipe"), record.get("iteration")
    return WeightFile(path, kind, tensors, container, dtypes, categories, recipe, iteration, convention)


def load_safely(path: Path) -> Any:
    """The content of a torch file: tensors, plain values and numpy scalars, nothing else.

    Raises:
        WeightsError: see `read_weights`.
    """
    start = _first_bytes(path)
    if not _is_zip(start) and not (start.startswith(b"\x80") and _LEGACY_MAGIC in start):
        raise WeightsError(f"{path} is not a weight file: it begins with {start[:20]!r}; download or copy it again")
    try:
        # An open file, since torch goes by the suffix of a path.
        with open(path, "rb") as file, torch.serialization.safe_globals(_SCALARS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if _is_zip(start) and zipfile.ZipFile(file).testzip():  # torch does not look at the checksums
                raise zipfile.BadZipFile
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _not_readable(path, error) from error
    except _DAMAGE as error:
        unsafe = re.search(r"(?:GLOBAL|class|function) '?([\w.]+\.\w+)|(TorchScript)", str(error))
        if unsafe:
            raise WeightsError(
                f"{path} is not loaded, because it holds more than tensors and may run code "
                f"({unsafe[1] or unsafe[2]}): save it again as a plain dictionary of tensors"
            ) from error
        raise WeightsError(f"{path} is cut off or damaged: download or copy it again") from error


def check_version(entries: Mapping[str, Any], path: Path) -> None:
    """Refuses a file of ours that a later program wrote."""
    version = entries.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise WeightsError(
            f"{path} has format version {version!r}, this program reads up to {FORMAT_VERSION}: update the program"
        )


def _load(path: Path) -> tuple[Any, str]:
    """The content of a file, and what container it is."""
    start = _first_bytes(path)
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        tensors, metadata = _load_safetensors(path)
        if RECORD not in metadata:
            return {**metadata, **tensors}, "safetensors"
        try:
            record = json.loads(metadata[RECORD])
        except json.JSONDecodeError as error:
            raise WeightsError(f"{path}: its metadata entry '{RECORD}' is no json: write the file again") from error
        return {**(record if isinstance(record, dict) else {}), "weights": tensors}, "safetensors"
    return load_safely(path), "torch" if _is_zip(start) else "torch before 1.6"


def _record(entries: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The entries if they are those of a file of ours, else nothing."""
    if not {"weights", "format_version"} <= entries.keys():
        return {}
    check_version(entries, path)
    for entry, kind in (("recipe", str), ("iteration", int)):
        if not isinstance(entries.get(entry), kind | None):
            raise WeightsError(f"{path}: its entry '{entry}' is {entries[entry]!r:.60}: use another file")
    return entries


def _unwrapped(content: Mapping[str, Any]) -> Mapping[str, Any]:
    for entry in _WRAPPERS:
        inner = content.get(entry)
        if isinstance(inner, Mapping):
            return inner
    return content


def _kind(names: Collection[str]) -> Kind:
    return next((kind for name, kind in _LANDMARKS.items() if name in names), Kind.UNKNOWN)


def _class_counts(state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    boxes, semantic = state.get("box_head.class_logits.bias"), state.get("semantic_head.score.bias")
    return None if boxes is None or semantic is None else (boxes.numel(), semantic.numel())


def _tensors(content: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensors by name, without prefix and as float32, and how many were stored as what."""
    named = content.items() if isinstance(content, Mapping) else ()
    stored = {str(name).removeprefix("module."): value for name, value in named if isinstance(value, Tensor)}
    if not stored:
        raise WeightsError(f"{path} holds no tensors by name: a dictionary of tensors (state_dict) is wanted")
    for name, tensor in stored.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_complex():
            raise WeightsError(f"{path} holds something else than real numbers in {name}: save it as a dense tensor")
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in stored.values())
    state = {name: t.detach().float() if t.is_floating_point() else t for name, t in stored.items()}
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{path} holds NaN or infinite values in {name}: use another file")
    return state, dict(dtypes)


def _load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except OSError as error:
        raise _not_readable(path, error) from error
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path} is cut off or no safetensors file: download or copy it again") from error


def _first_bytes(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(64)
    except FileNotFoundError as error:
        known = known_file(path.name)
        get = f"run ./download_weights.sh {known.group}" if known else "train or download it first"
        raise WeightsError(f"there is no weight file {path}: check the path, or {get}") from error
    except OSError as error:
        raise _not_readable(path, error) from error


def _is_zip(start: bytes) -> bool:
    return start.startswith(b"PK\x03\x04")


def _not_readable(path: Path, error: OSError) -> WeightsError:
    return WeightsError(f"weight file {path} cannot be read ({error.strerror or error}): check the path")
