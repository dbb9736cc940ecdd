"""Indexes kept on disk, so that COCO's jsons are read once and not at every start.

An entry is a pair of files: NAME.bin holds the bytes of all arrays of an index, NAME.json says where each begins and
what they belong to. It counts only if it was made from exactly these jsons (path, size, modification time), in this
format, and its checksum fits; anything else is made anew. So the folder can be deleted at any time.
The arrays are mapped into memory: processes that read the same set share them.
"""

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from upsnet.dataset.index import PanopticIndex, Texts, index_panoptic
from upsnet.dataset.instance_index import InstanceIndex, read_instances
from upsnet.structures.categories import Categories
from upsnet.structures.places import remove, write_temporary

logger = logging.getLogger("upsnet")

FORMAT = 2
"""To be raised whenever the same json would give other arrays; other names of arrays are noticed without that."""

SMALLEST = 10 << 20
"""Bytes of a json worth an entry: a smaller one is read in about a second."""

_ALIGNMENT = 64

Index = TypeVar("Index", PanopticIndex, InstanceIndex)
Arrays = dict[str, NDArray[Any]]


def index_folder(dataset_path: Path) -> Path | None:
    """Where the indexes of a data set are kept: in itself, under UPSNET_INDEX, or nowhere if that is 0."""
    chosen = os.environ.get("UPSNET_INDEX", "")
    if chosen == "0":
        return None
    if not chosen:
        return Path(dataset_path) / ".upsnet_index"
    whole = Path(dataset_path).resolve()
    return Path(chosen) / f"{whole.name}-{hashlib.sha256(str(whole).encode()).hexdigest()[:8]}"


class IndexCache:
    """Takes indexes from a folder, or makes them and keeps them there. A folder that cannot be written is no error."""

    def __init__(self, folder: Path | None, smallest: int = SMALLEST) -> None:
        """Args:
        folder: None: keep nothing.
        smallest: jsons with fewer bytes are always read themselves.
        """
        self._folder, self._smallest = folder, smallest

    def panoptic(self, path: Path) -> tuple[Categories, PanopticIndex]:
        """As `index_panoptic` gives them."""
        entry = self._entry(PanopticIndex, path)
        if entry and (found := entry.load()):
            arrays, classes = found
            return Categories.from_coco(classes, str(path)), _from_arrays(PanopticIndex, path, arrays)
        categories, index = index_panoptic(path)
        if entry:
            entry.store(_to_arrays(index), categories.to_coco())
        return categories, index

    def instances(self, path: Path, categories: Categories, images: PanopticIndex) -> InstanceIndex:
        """As `read_instances` gives them."""
        entry = self._entry(InstanceIndex, path, images.source)
        if entry and (found := entry.load()):
            return _from_arrays(InstanceIndex, path, found[0])
        index = read_instances(path, categories, images)
        if entry:
            entry.store(_to_arrays(index), categories.to_coco())
        return index

    def _entry(self, kind: type[Index], *sources: Path) -> "_Entry | None":
        """The entry of the first source's index, which depends on all of them; None: none is to be kept."""
        if self._folder is None or not all(source.is_file() for source in sources):
            return None  # that a json is missing is for the reader to say
        stats = [source.stat() for source in sources]
        if stats[0].st_size < self._smallest:
            return None
        key = {
            "format": FORMAT,
            "fields": [field.name for field in fields(kind)],
            "sources": [
                [str(source.resolve()), stat.st_size, stat.st_mtime_ns]
                for source, stat in zip(sources, stats, strict=True)
            ],
        }
        return _Entry(self._folder / sources[0].stem, key)


class _Entry:
    """A pair of files, and the key under which its content counts."""

    def __init__(self, base: Path, key: dict[str, Any]) -> None:
        self._data, self._head = base.with_name(f"{base.name}.bin"), base.with_name(f"{base.name}.json")
        self._key = key

    def load(self) -> tuple[Arrays, Any] | None:
        """Arrays, mapped, and categories; None if the entry is missing, half written, damaged, or of other files."""
        try:
            head = json.loads(self._head.read_text(encoding="utf-8"))
            if head["key"] != self._key:
                return None
            block = np.memmap(self._data, np.uint8, "r").view(np.ndarray)
            if _checksum(head["content"], [block]) != head["checksum"]:
                logger.warning("%s: is damaged and is made anew", self._data)
                return None
        except (OSError, ValueError, LookupError, TypeError):  # what damaged or foreign files raise
            return None
        arrays = {
            name: block[begin : begin + length].view(dtype).reshape(shape)
            for name, dtype, shape, begin, length in head["content"]["arrays"]
        }
        return arrays, head["content"]["categories"]

    def store(self, arrays: Arrays, categories: Any) -> None:
        """Writes the entry; the json comes last and makes it count."""
        table, chunks, end = [], [], 0
        for name, array in arrays.items():
            padding = -array.nbytes % _ALIGNMENT
            table.append([name, array.dtype.str, list(array.shape), end, array.nbytes])
            chunks += [np.ascontiguousarray(array).reshape(-1).view(np.uint8), np.zeros(padding, np.uint8)]
            end += array.nbytes + padding
        content = {"arrays": table, "categories": categories}
        head = {"key": self._key, "content": content, "checksum": _checksum(content, chunks)}
        try:
            self._data.parent.mkdir(parents=True, exist_ok=True)
            _write(self._data, *(chunk.data for chunk in chunks))
            _write(self._head, json.dumps(head).encode())
        except OSError as error:
            logger.info("%s: cannot be kept (%s): UPSNET_INDEX=DIR keeps indexes elsewhere", self._data, error.strerror)
            return
        logger.info("%s: index of %.0f MB, for faster starts; it may be deleted at any time", self._data, end / 1e6)


def _write(path: Path, *data: bytes | memoryview) -> None:
    # Under a name of its own first: several processes may write the same entry at once.
    temporary = write_temporary(path, *data)
    try:
        os.replace(temporary, path)
    except OSError:
        remove(temporary)
        raise


def _checksum(content: dict[str, Any], chunks: Sequence[NDArray[np.uint8]]) -> int:
    value = zlib.crc32(json.dumps(content).encode())
    for chunk in chunks:
        value = zlib.crc32(chunk.data, value)
    return value


def _to_arrays(index: PanopticIndex | InstanceIndex) -> Arrays:
    """All fields but `source`; texts as two arrays."""
    arrays: Arrays = {}
    for field in fields(index):
        value = getattr(index, field.name)
        if isinstance(value, Texts):
            arrays[f"{field.name}.utf8"], arrays[f"{field.name}.ends"] = value.utf8, value.ends
        elif isinstance(value, np.ndarray):
            arrays[field.name] = value
    return arrays


def _from_arrays(kind: type[Index], source: Path, arrays: Arrays) -> Index:
    values: dict[str, Any] = {"source": source}
    for field in fields(kind):
        if field.type is Texts:
            values[field.name] = Texts.of(arrays[f"{field.name}.utf8"], arrays[f"{field.name}.ends"])
        elif field.name in arrays:
            values[field.name] = arrays[field.name]
    return kind(**values)
