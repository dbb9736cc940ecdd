"""The result folder of a test: written photo by photo, read back for `--eval_only`.

* panoptic/*.png, panoptic.json: COCO panoptic format, for the official tools.
* semantic/*.png: semantic ids (0..S-1, stuff first), 8-bit with no label = 255; from 256 classes on 16-bit with no
  label = 65535.
* bbox_results.json, segm_results.json: COCO results.
* index.json: images, parts and class table; written last, it marks the folder complete.
* summary.json: the scores.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upsnet.evaluation.coco_files import panoptic_record, read_panoptic, records_by_image
from upsnet.evaluation.detection_files import DETECTION_KINDS, DetectionReader, detection_file, detection_records
from upsnet.evaluation.json_files import JsonListWriter, read_json, write_json
from upsnet.structures.categories import Categories
from upsnet.structures.errors import DataError, PlaceError
from upsnet.structures.panoptic_png import id_to_rgb
from upsnet.structures.pictures import read_grey_png, write_png
from upsnet.structures.places import writing
from upsnet.structures.results import Prediction
from upsnet.structures.sample import VOID

PARTS = ("panoptic", "semantic", "instances")
"""What a prediction may have, by the names of index.json."""

RETRY = "run the test without --eval_only"


class ResultWriter:
    """Writes all results of a test, whether they can be scored or not.

    Use it as a context: the files have their names after it; an error inside leaves no index behind.
    """

    def __init__(self, folder: Path, categories: Categories) -> None:
        """
        Raises:
            PlaceError: the folder cannot be written.
        """
        self._folder = folder
        self._categories = categories
        self._images: list[dict[str, Any]] = []
        self._names = PngNames()
        self._parts: list[str] | None = None
        with writing(folder / "index.json"):
            # What lies here from an earlier test is no longer complete from now on, and its scores are of nothing here.
            for name in ("index.json", "summary.json"):
                (folder / name).unlink(missing_ok=True)
            if parts_folder(folder).exists():
                shutil.rmtree(parts_folder(folder))
        self._lists: dict[str, JsonListWriter] = {}
        try:
            self._lists["panoptic"] = JsonListWriter(folder / "panoptic.json", head='{"annotations": [')
            for kind in DETECTION_KINDS:
                self._lists[kind] = JsonListWriter(detection_file(folder, kind))
        except BaseException:
            self._discard()
            raise

    def add(self, prediction: Prediction) -> None:
        """Writes the PNGs, the record and the detections of one photo.

        Raises:
            PlaceError: the folder cannot be written or the disk is full.
        """
        png_name = self._names.of(prediction.image_id, prediction.file_name)
        self.add_records(write_pngs(self._folder, prediction, png_name, self._categories))

    def add_records(self, records: dict[str, Any]) -> None:
        """Takes in what `write_pngs` told of one photo.

        Raises:
            PlaceError: the folder cannot be written or the disk is full.
        """
        parts, image = [part for part in PARTS if part in records], records["image"]
        if self._parts is None:
            self._parts = parts
        elif parts != self._parts:
            raise ValueError(f"image {image['id']} has the parts {parts}, the images before it {self._parts}")
        self._images.append(image)
        if "panoptic" in parts:
            self._lists["panoptic"].write(records["panoptic"])
        if "instances" in parts:
            for kind in DETECTION_KINDS:
                for record in records["instances"][kind]:
                    self._lists[kind].write(record)

    def close(self) -> None:
        """Gives the files their names; index.json comes last.

        Raises:
            PlaceError: the folder cannot be written or the disk is full.
        """
        parts = self._parts or []
        categories = self._categories.to_coco()
        try:
            if "panoptic" in parts:
                tail = {"images": self._images, "categories": categories}
                self._lists["panoptic"].close("], " + json.dumps(tail)[1:])
            if "instances" in parts:
                for kind in DETECTION_KINDS:
                    self._lists[kind].close()
            write_json(self._folder / "index.json", {"parts": parts, "images": self._images, "categories": categories})
            shutil.rmtree(parts_folder(self._folder), ignore_errors=True)
        finally:
            self._discard()

    def __enter__(self) -> "ResultWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._discard()

    def _discard(self) -> None:
        """Removes what has no name yet: everything after an error, parts that do not occur at the end."""
        for writer in self._lists.values():
            writer.discard()


def parts_folder(folder: Path) -> Path:
    """Where the workers of a test leave their parts of a result folder, see `result_parts.py`."""
    return folder / "parts"


class PngNames:
    """Names of PNGs: the photo's with .png; with the image id where one before it differs only in folder or ending."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def of(self, image_id: int, file_name: str) -> str:
        """The name for the next photo."""
        stem = PurePosixPath(file_name).stem
        name = f"{stem}.png"
        if name.lower() in self._given:
            name = f"{stem}_{image_id}.png"
        self._given.add(name.lower())
        return name


def write_pngs(folder: Path, prediction: Prediction, png_name: str, categories: Categories) -> dict[str, Any]:
    """Writes the maps of one photo into a result folder; what goes into the json files of it: `image` and `PARTS`.

    Raises:
        PlaceError: the folder cannot be written or the disk is full.
    """
    records: dict[str, Any] = {}
    height = width = 0
    if prediction.segment_map is not None:
        height, width = prediction.segment_map.shape
        write_png(folder / "panoptic" / png_name, id_to_rgb(prediction.segment_map))
        records["panoptic"] = panoptic_record(prediction, png_name, categories)
    if prediction.semantic_map is not None:
        height, width = prediction.semantic_map.shape
        write_png(folder / "semantic" / png_name, _semantic_pixels(prediction.semantic_map, len(categories)))
        records["semantic"] = None  # all is in the PNG
    if prediction.instances is not None:
        records["instances"] = {
            kind: detection_records(prediction.instances, prediction.image_id, categories, kind)
            for kind in DETECTION_KINDS
        }
    records["image"] = {
        "id": prediction.image_id,
        "file_name": prediction.file_name,
        "height": height,
        "width": width,
        "png": png_name,
    }
    return records


def read_results(folder: Path, categories: Categories) -> Iterator[Prediction]:
    """The stored predictions, in the order in which they were written.

    Raises:
        PlaceError: the folder or a file is missing or cannot be read.
        DataError: a file is damaged, or the results were made with another class table.
    """
    index = _read_index(folder, categories)
    records = _read_panoptic_records(folder) if "panoptic" in index["parts"] else {}
    detections = DetectionReader(folder, categories) if "instances" in index["parts"] else None
    for image in index["images"]:
        prediction = Prediction(image["id"], image["file_name"])
        if "panoptic" in index["parts"]:
            if image["id"] not in records:
                raise DataError(f"{folder / 'panoptic.json'}: has no annotation of image {image['id']}: {RETRY}")
            prediction.segment_map, prediction.segments = read_panoptic(
                records[image["id"]], folder / "panoptic.json", categories
            )
        if "semantic" in index["parts"]:
            prediction.semantic_map = _read_semantic(folder / "semantic" / image["png"], image["id"], len(categories))
        if detections is not None:
            size = None if prediction.segment_map is None else prediction.segment_map.shape
            prediction.instances = detections.of_image(image["id"], size)
        yield prediction
    if detections is not None:
        detections.check_end()


def write_summary(folder: Path, summary: dict[str, Any]) -> Path:
    """Writes `summary.json` (`panoptic`, `box`, `mask`, `semantic`, as far as they were scored); returns its path.

    Raises:
        PlaceError: the folder cannot be written or the disk is full.
    """
    path = folder / "summary.json"
    write_json(path, summary)
    return path


def _read_index(folder: Path, categories: Categories) -> dict[str, Any]:
    path = folder / "index.json"
    if not path.is_file():
        raise PlaceError(f"{folder}: holds no complete results (no index.json): {RETRY}")
    index = read_json(path)
    if not (
        _has(index, {"parts": list, "images": list, "categories": list})
        and all(_has(image, {"id": int, "file_name": str, "png": str}) for image in index["images"])
        and all(_has(category, {"id": int, "name": str, "isthing": int}) for category in index["categories"])
    ):
        raise DataError(f"{path}: is damaged: {RETRY}")
    stored = [(c["id"], c["name"], c["isthing"]) for c in index["categories"]]
    for position, (found, wanted) in enumerate(zip(stored, categories, strict=False)):
        if found != (wanted.id, wanted.name, int(wanted.is_thing)):
            raise DataError(
                f"{path}: class {position} is '{found[1]}' (id {found[0]}), in the data set '{wanted.name}' "
                f"(id {wanted.id}): use the data set that the results were made with"
            )
    if len(stored) != len(categories):
        raise DataError(
            f"{path}: the results have {len(stored)} classes, the data set {len(categories)}: use the data set that "
            f"the results were made with"
        )
    return index


def _has(record: Any, types: dict[str, type]) -> bool:
    return isinstance(record, dict) and all(isinstance(record.get(key), kind) for key, kind in types.items())


def _read_panoptic_records(folder: Path) -> dict[int, dict[str, Any]]:
    path = folder / "panoptic.json"
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: is damaged: {RETRY}")
    return records_by_image(content, path)


def _void_pixel(num_classes: int) -> int:
    return 255 if num_classes <= 255 else 65535


def _semantic_pixels(semantic_map: NDArray[np.int16], num_classes: int) -> NDArray[Any]:
    void = _void_pixel(num_classes)
    pixels = np.where(semantic_map == VOID, void, semantic_map)
    return pixels.astype(np.uint8 if void == 255 else np.uint16)


def _read_semantic(path: Path, image_id: int, num_classes: int) -> NDArray[np.int16]:
    try:
        pixels, void = read_grey_png(path), _void_pixel(num_classes)
    except DataError as error:
        raise DataError(f"image {image_id}: {error}") from None
    strange = pixels[(pixels >= num_classes) & (pixels != void)]
    if strange.size:
        raise DataError(
            f"image {image_id}: {path} holds class {strange[0]}, the class table has {num_classes} classes: {RETRY}"
        )
    return np.where(pixels == void, VOID, pixels.astype(np.int32)).astype(np.int16)
