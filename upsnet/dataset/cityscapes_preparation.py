"""Makes a Cityscapes tree ready, with the official tools; no official file is changed, nothing is downloaded.

What is made, and where it lies: see `upsnet.dataset.cityscapes`.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import numpy as np
from cityscapesscripts.helpers.annotation import Annotation
from cityscapesscripts.helpers.labels import id2label
from cityscapesscripts.preparation.createPanopticImgs import convert2panoptic
from cityscapesscripts.preparation.json2labelImg import createLabelImage
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from tqdm import tqdm

from upsnet.dataset.cityscapes import Split
from upsnet.dataset.cityscapes_check import check_tree
from upsnet.structures.class_tables import class_table
from upsnet.structures.errors import DataError
from upsnet.structures.pictures import png_size, read_grey_png
from upsnet.structures.places import replacing, writing

Step = TypeVar("Step")

_FIRST_ID = {"train": 1, "val": 1_000_001, "test": 2_000_001, "train_extra": 3_000_001, "demoVideo": 4_000_001}
_FIRST_ID_OF_OTHERS = 5_000_001
"""Image ids count the photos of a split from here on, so that splits can be joined."""

_FEW = 32
"""Up to so many photos are converted in this process: starting others would take longer."""


def prepare_cityscapes(root: Path, workers: int | None = None) -> dict[str, int]:
    """Checks the tree at `root` and makes what is not there yet.

    Args:
        workers: processes; default: one for each processor core.

    Returns:
        Number of photos by split.

    Raises:
        DataError: files are missing or damaged, or photos and labels do not fit each other.
        PlaceError: the tree cannot be written.
    """
    counts = {}
    for split in check_tree(root):
        photos = split.photos()
        read = (png_size(split.photo_dir / photo) for photo in photos)
        sizes = list(_progress(read, len(photos), split, "photos"))
        if not split.has_labels:
            _write_json(split.info_json, {"images": _image_records(split, photos, sizes), "categories": _categories()})
        elif not _is_ready(split, photos):
            _convert_split(split, photos, sizes, workers or os.cpu_count() or 1)
        counts[split.name] = len(photos)
    return counts


class _Converted(NamedTuple):
    """One photo: the content of the official converter's json, and its things as COCO annotations without ids."""

    official: dict[str, Any]
    instances: list[dict[str, Any]]


def _convert_split(split: Split, photos: list[str], sizes: list[tuple[int, int]], workers: int) -> None:
    converted = list(_convert_all(split, photos, sizes, workers))
    with writing(split.panoptic_json):
        split.panoptic_json.unlink(missing_ok=True)  # until it is written again, the split is not ready
    official = {key: [one.official[key][0] for one in converted] for key in ("images", "annotations")}
    _write_json(split.official_json, {**official, "categories": converted[0].official["categories"]}, official=True)

    images, categories = _image_records(split, photos, sizes), _categories()
    annotations: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    for image, one in zip(images, converted, strict=True):
        annotations.append({**one.official["annotations"][0], "image_id": image["id"]})
        for record in one.instances:
            instances.append({"id": len(instances) + 1, "image_id": image["id"], **record})
    things = [category for category in categories if category["isthing"]]
    _write_json(split.instances_json, {"images": images, "annotations": instances, "categories": things})
    _write_json(split.panoptic_json, {"images": images, "annotations": annotations, "categories": categories})


def _convert_all(split: Split, photos: list[str], sizes: list[tuple[int, int]], workers: int) -> Iterator[_Converted]:
    convert, sized = partial(_convert, split), list(zip(photos, sizes, strict=True))
    if len(photos) <= _FEW or workers == 1:
        yield from _progress(map(convert, sized), len(photos), split, "labels")
        return
    # Fresh processes instead of forks: this one may already run threads.
    with get_context("spawn").Pool(min(workers, len(photos))) as pool:
        yield from _progress(pool.imap(convert, sized, chunksize=4), len(photos), split, "labels")


def _convert(split: Split, sized: tuple[str, tuple[int, int]]) -> _Converted:
    photo, size = sized
    ids = _instance_ids(split, photo)
    if ids.shape != size:
        raise DataError(
            f"{split.photo_dir / photo}: the photo has {size[0]}×{size[1]} pixels (height × width), its label "
            f"{ids.shape[0]}×{ids.shape[1]}: unpack both archives again"
        )
    _write_train_ids(split, photo, ids.shape)
    # The official converter takes whole folders: each photo gets one of its own, so that none has to wait for all.
    with replacing(split.panoptic_png(photo)) as part, TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "set" / "city").mkdir(parents=True)
        shutil.copy(split.label(photo, "instanceIds.png"), folder / "set" / "city")
        with redirect_stdout(StringIO()):
            convert2panoptic(name, name, False, ["set"])
        official = json.loads((folder / "cityscapes_panoptic_set.json").read_text(encoding="utf-8"))
        shutil.copyfile(folder / "cityscapes_panoptic_set" / official["annotations"][0]["file_name"], part)
    return _Converted(official, _instances(ids))


def _instance_ids(split: Split, photo: str) -> NDArray[Any]:
    path = split.label(photo, "instanceIds.png")
    ids = read_grey_png(path)
    for value in np.unique(ids).tolist():
        if _label_id(value) not in id2label:
            raise DataError(f"{path}: holds the id {value}, which Cityscapes does not know: unpack gtFine again")
    return ids


def _label_id(value: int) -> int:
    """The label of a value of an instance-id image."""
    return value if value < 1000 else value // 1000


def _instances(ids: NDArray[Any]) -> list[dict[str, Any]]:
    """The things of an official instance-id image as COCO annotations; those without a number of their own are groups.

    A group (car, but not which: id 26) is a crowd; classes that are not scored are left out.
    """
    records = []
    for value in np.unique(ids).tolist():
        label = id2label[_label_id(value)]
        if label.hasInstances and not label.ignoreInEval:
            rle = coco_mask.encode(np.asfortranarray(ids == value, dtype=np.uint8))
            records.append(
                {
                    "category_id": label.id,
                    "iscrowd": int(value < 1000),
                    "area": int(coco_mask.area(rle)),
                    "bbox": coco_mask.toBbox(rle).tolist(),
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                }
            )
    return records


def _write_train_ids(split: Split, photo: str, size: tuple[int, ...]) -> None:
    """The official label image with train ids, as the official tools name it."""
    polygons, target = split.label(photo, "polygons.json"), split.label(photo, "labelTrainIds.png")
    if _is_complete(target):
        return
    annotation = Annotation()
    try:
        with redirect_stdout(StringIO()):
            annotation.fromJsonFile(str(polygons))
            picture = createLabelImage(annotation, "trainIds")
    # The official tool leaves the program where it does not know a label.
    except (ValueError, TypeError, KeyError, IndexError, SystemExit) as error:
        raise DataError(
            f"{polygons}: the official converter refuses it ({type(error).__name__}: {error}): unpack gtFine again"
        ) from None
    if picture.size != size[::-1]:
        raise DataError(f"{polygons}: has another image size than the label images beside it: unpack gtFine again")
    with replacing(target) as part:
        picture.save(part, format="PNG")


def _is_ready(split: Split, photos: list[str]) -> bool:
    """Whether all files of this split are there, whole, and of these photos."""
    pictures = [split.panoptic_png(photo) for photo in photos]
    pictures += [split.label(photo, "labelTrainIds.png") for photo in photos]
    if not (split.official_json.exists() and split.instances_json.exists() and all(map(_is_complete, pictures))):
        return False
    try:
        images = json.loads(split.panoptic_json.read_text(encoding="utf-8"))["images"]
        return [image["file_name"] for image in images] == photos
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_complete(png: Path) -> bool:
    try:
        png_size(png)
    except DataError:
        return False
    return True


def _image_records(split: Split, photos: list[str], sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    first = _FIRST_ID.get(split.name, _FIRST_ID_OF_OTHERS)
    return [
        {"id": first + i, "file_name": photo, "height": height, "width": width}
        for i, (photo, (height, width)) in enumerate(zip(photos, sizes, strict=True))
    ]


def _categories() -> list[dict[str, Any]]:
    table = class_table("Cityscapes")
    assert table is not None
    return table.to_coco()


def _progress(steps: Iterable[Step], count: int, split: Split, what: str) -> Iterable[Step]:
    return tqdm(steps, f"{split.name}: {what}", count, unit="image", leave=False)


def _write_json(path: Path, content: Any, official: bool = False) -> None:
    """Leaves a file alone that holds just this. official: laid out as the official tool does."""
    data = (json.dumps(content, sort_keys=True, indent=4) if official else json.dumps(content)).encode()
    if path.is_file() and path.read_bytes() == data:
        return
    with replacing(path) as part:
        part.write_bytes(data)
