"""Image sets in a few large tar files: no file system then has to serve hundreds of thousands of small ones.

`shards/<set>-000000.tar`, …: each photo and, behind it under the same key, its label, as webdataset lays them out.
`shards/<set>.json`: where in which tar each begins, its length and checksum; it is written last, so that where it
stands, the set is whole. Files are read by their place and not as a stream: so the order of a training is that of its
sampler, and a run that is resumed goes on exactly. `annotations/` holds the jsons, as in the official layout.
"""

import json
import zlib
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upsnet.dataset.index import Texts
from upsnet.structures.errors import DataError

FORMAT = 1

COLUMNS = ("name", "tar", "start", "length", "checksum")
"""Of the index, one entry a file; the files are in the order of their names."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside a tar: `length` bytes from byte `start` on."""

    tar: Path
    name: str
    start: int
    length: int
    checksum: int

    def read_bytes(self) -> bytes:
        """Raises:
        DataError: the bytes are not those that were put there.
        OSError: the tar cannot be read.
        """
        with open(self.tar, "rb") as file:
            file.seek(self.start)
            data = file.read(self.length)
        if zlib.crc32(data) != self.checksum:
            raise DataError(f"{self}: its bytes are not those that were written: copy {self.tar.name} again")
        return data

    def __str__(self) -> str:
        return f"{self.tar}:{self.name}"


@dataclass(frozen=True, slots=True)
class ShardFolder:
    """Stands for a folder: `folder / name` is a file of it. In arrays, which loader processes share; N files."""

    tars: Sequence[Path]
    names: Texts
    tar_of: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    checksums: NDArray[np.int64]

    def __truediv__(self, name: str) -> Member:
        """Raises:
        DataError: there is no such file.
        """
        i = bisect_left(self.names, name)
        if i == len(self.names) or self.names[i] != name:
            raise DataError(f"{self.tars[0].parent}: no shard of {self.tars[0].stem} holds {name}: write them anew")
        return self._member(i)

    def __len__(self) -> int:
        return len(self.names)

    def members(self) -> list[Member]:
        """All files, by name."""
        return [self._member(i) for i in range(len(self))]

    def _member(self, i: int) -> Member:
        tar = self.tars[self.tar_of[i]]
        return Member(tar, self.names[i], int(self.starts[i]), int(self.lengths[i]), int(self.checksums[i]))


@dataclass(frozen=True, slots=True)
class Shards:
    """The shards of an image set. labels: None: it has none."""

    photos: ShardFolder
    labels: ShardFolder | None


def shards_index(dataset_path: Path, image_set: str) -> Path | None:
    """Where the places of an image set's files are written down, if it is in shards."""
    path = Path(dataset_path) / "shards" / f"{image_set}.json"
    return path if path.is_file() else None


def open_shards(index: Path) -> Shards:
    """Raises:
    DataError: the index is damaged, or a tar is not there or has another length.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        tars = {index.parent / name: size for name, size in content["tars"].items()}
        folders = [_folder(list(tars), content[kind]) if content[kind] else None for kind in ("photos", "labels")]
        version = content["format"]
    except OSError as error:
        raise DataError(f"{index}: cannot be read ({error.strerror}): check the path") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{index}: is damaged or no index of shards: copy it again") from None
    photos, labels = folders
    if version != FORMAT or photos is None:
        raise DataError(f"{index}: is of another version: write the shards anew by `upsnet prepare coco --shards`")
    for tar, size in tars.items():
        there = tar.stat().st_size if tar.is_file() else None
        if there != size:
            found = "is not there" if there is None else f"has {there} bytes"
            raise DataError(f"{tar}: {found}, {index.name} says {size} bytes: copy it again")
    return Shards(photos, labels)


def _folder(tars: Sequence[Path], columns: Mapping[str, Any]) -> ShardFolder:
    names, *numbers = (columns[name] for name in COLUMNS)
    return ShardFolder(tars, Texts(names), *(np.array(column, np.int64) for column in numbers))
