"""Writes image sets in COCO's layout as shards; see `shards.py`."""

import io
import json
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from upsnet.dataset.image_sets import ImageSet, UnlabelledImageSet, coco_image_sets
from upsnet.dataset.index import ImageIndex, PanopticIndex, index_images, index_panoptic
from upsnet.dataset.photo_set import check_folder
from upsnet.dataset.shards import COLUMNS, FORMAT, shards_index
from upsnet.structures.errors import DataError
from upsnet.structures.pictures import read_complete
from upsnet.structures.places import remove, replacing

SHARD_BYTES = 1 << 30
"""A tar is ended when it has reached this length."""

Files = ImageSet | UnlabelledImageSet


class _File(NamedTuple):
    """kind: photos or labels. name: that by which the json calls it. member: its name in the tar."""

    kind: str
    name: str
    member: str
    data: bytes


def write_shards(dataset_path: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> dict[str, int]:
    """Writes every image set under `dataset_path` that has a json as shards to `out`. Shows progress.

    An image set is whole there or does not count.

    Returns:
        The photos of each set.

    Raises:
        DataError: there is no image set, or a file of one is missing or cut off.
        PlaceError: `out` cannot be written or the disk is full.
    """
    names = sorted(
        path.stem.removeprefix(kind)
        for kind in ("panoptic_", "image_info_")
        for path in (dataset_path / "annotations").glob(f"{kind}*.json")
    )
    if not names:
        raise DataError(f"{dataset_path}: has no annotations/panoptic_*.json or image_info_*.json: check the path")
    return {name: _write_set(dataset_path, out, name, shard_bytes) for name in dict.fromkeys(names)}


def _write_set(dataset_path: Path, out: Path, name: str, shard_bytes: int) -> int:
    (files,) = coco_image_sets(dataset_path, name)
    if files.shards is not None:
        raise DataError(f"{files.shards}: {name} is in shards already: name the folder with its images, or remove this")
    check_folder(files.image_dir)
    index: ImageIndex
    if isinstance(files, ImageSet):
        check_folder(files.png_dir)
        _, index = index_panoptic(files.panoptic_json)
        jsons = [files.panoptic_json, files.instances_json]
    else:
        index, jsons = index_images(files.info_json), [files.info_json]
    if (old := shards_index(out, name)) is not None:
        remove(old)  # from here on the set does not count
    rows = tqdm(range(len(index)), desc=name, unit="image", dynamic_ncols=True)
    content = _write_tars(out / "shards", name, (_files_of(files, index, row) for row in rows), shard_bytes)
    for source in filter(None, jsons):
        _copy(source, out / "annotations" / source.name)
    with replacing(out / "shards" / f"{name}.json") as part:
        part.write_text(json.dumps(content), encoding="utf-8")
    return len(index)


def _files_of(files: Files, index: ImageIndex, row: int) -> list[_File]:
    photo = index.photo_names[row]
    found = [_File("photos", photo, photo, read_complete(files.image_dir / photo))]
    if isinstance(files, ImageSet):
        assert isinstance(index, PanopticIndex)
        label = index.png_names[row]
        # One key with the photo, and another name than a photo that is a PNG.
        key = Path(photo).with_suffix(".panoptic.png").as_posix()
        found.append(_File("labels", label, key, read_complete(files.png_dir / label)))
    return found


def _write_tars(folder: Path, name: str, images: Iterator[list[_File]], shard_bytes: int) -> dict[str, Any]:
    """Writes the files of all images, those of one into the same tar, and returns the content of the index."""
    tars: dict[str, int] = {}
    rows: dict[str, list[tuple[Any, ...]]] = {"photos": [], "labels": []}
    image = next(images, None)
    while image is not None:
        path = folder / f"{name}-{len(tars):06}.tar"
        with replacing(path) as part, tarfile.open(part, "w") as tar:
            while image is not None and tar.offset < shard_bytes:
                for file in image:
                    start = _append(tar, file.member, file.data)
                    rows[file.kind].append((file.name, len(tars), start, len(file.data), zlib.crc32(file.data)))
                image = next(images, None)
        tars[path.name] = path.stat().st_size
    for number in count(len(tars)):  # those that an earlier, longer set has left
        if not (path := folder / f"{name}-{number:06}.tar").exists():
            break
        remove(path)
    columns = {
        kind: dict(zip(COLUMNS, zip(*sorted(of_kind), strict=True), strict=True)) if of_kind else None
        for kind, of_kind in rows.items()
    }
    return {"format": FORMAT, "tars": tars, **columns}


def _append(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Adds a file and returns where its bytes begin. Equal files make equal tars: no times, no owners."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
    return tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _copy(source: Path, target: Path) -> None:
    if source.resolve() != target.resolve():
        with replacing(target) as part:
            shutil.copyfile(source, part)
