"""The annotations of a whole data set in a few flat numpy arrays.

118,287 COCO images take about 0.4 GB this way, nearly all of it polygon corners, and loader processes that fork
share it: there are no Python objects whose reference counts would make the system copy the pages.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upsnet.dataset.json_records import records_of
from upsnet.structures.categories import Categories
from upsnet.structures.errors import DataError
from upsnet.structures.panoptic_png import MAX_SEGMENT_ID

Ints = NDArray[np.int64]


class Texts(Sequence[str]):
    """Many short texts in one block of bytes."""

    def __init__(self, texts: Sequence[str]) -> None:
        encoded = [text.encode() for text in texts]
        self.utf8 = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.ends = np.cumsum([0, *(len(text) for text in encoded)])

    @classmethod
    def of(cls, utf8: NDArray[np.uint8], ends: Ints) -> "Texts":
        """From the two arrays of another one."""
        texts = cls([])
        texts.utf8, texts.ends = utf8, ends
        return texts

    def __getitem__(self, index: Any) -> Any:
        return self.utf8[self.ends[index] : self.ends[index + 1]].tobytes().decode()

    def __len__(self) -> int:
        return len(self.ends) - 1

    @property
    def nbytes(self) -> int:
        return int(self.utf8.nbytes + self.ends.nbytes)


@dataclass(frozen=True, slots=True)
class ImageIndex:
    """The photos that a json lists: N, in ascending id. heights, widths: pixels."""

    source: Path
    image_ids: Ints
    heights: NDArray[np.int32]
    widths: NDArray[np.int32]
    photo_names: Texts

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def nbytes(self) -> int:
        return bytes_of(self)


@dataclass(frozen=True, slots=True)
class PanopticIndex(ImageIndex):
    """A panoptic json: N images in ascending id, their S segments one after another.

    photo_names, png_names: file names. offsets: N+1, the segments of image i are offsets[i]:offsets[i+1].
    segment_ids, semantic_ids, is_crowd: one entry a segment. has_box: the segment is a single thing and, if the json
    gives its box, at least two pixels wide and high.
    """

    png_names: Texts
    offsets: Ints
    segment_ids: NDArray[np.int32]
    semantic_ids: NDArray[np.int16]
    is_crowd: NDArray[np.bool_]
    has_box: NDArray[np.bool_]

    def segments_of(self, row: int) -> slice:
        """The segments of an image."""
        return slice(int(self.offsets[row]), int(self.offsets[row + 1]))


def index_images(path: Path) -> ImageIndex:
    """Reads and checks the list of photos (`images`) of a COCO json; whatever else it holds is passed over.

    Raises:
        DataError: it is missing or broken, lists no images, or an image id twice.
    """
    images = _image_columns()
    for key, record in records_of(path):
        if key == "images":
            _read_image(path, record, images)
    return ImageIndex(path, *_in_order(images, _image_order(path, images)))


def index_panoptic(path: Path) -> tuple[Categories, PanopticIndex]:
    """Reads and checks a panoptic json.

    Raises:
        DataError: it is missing or broken, lacks a key, or contradicts itself: images without annotation or the other
            way round, doubled image or segment ids, unknown categories.
    """
    images = _image_columns()
    annotations: dict[str, Any] = {"image_id": array("q"), "file_name": [], "count": array("q")}
    segments = {"id": array("q"), "category_id": array("q"), "is_crowd": array("b"), "wide": array("b")}
    classes: list[Any] = []
    for key, record in records_of(path):
        if key == "images":
            _read_image(path, record, images)
        elif key == "annotations":
            _read_annotation(path, record, annotations, segments)
        elif key == "categories":
            classes.append(record)
    if not classes:
        raise DataError(f"{path}: has no 'categories': this is not a COCO panoptic file")
    categories = Categories.from_coco(classes, str(path))
    return categories, _assemble(path, categories, images, annotations, segments)


def _image_columns() -> dict[str, Any]:
    # Arrays refuse what is no whole number or too large for the index.
    return {"id": array("q"), "height": array("i"), "width": array("i"), "file_name": []}


def _image_order(path: Path, images: dict[str, Any]) -> Ints:
    """Brings the images into ascending id."""
    if not images["id"]:
        raise DataError(f"{path}: lists no images")
    ids = np.array(images["id"], np.int64)
    order = np.argsort(ids, kind="stable")
    _check_distinct(path, ids[order], "images")
    return order


def _in_order(images: dict[str, Any], order: Ints) -> tuple[Ints, NDArray[np.int32], NDArray[np.int32], Texts]:
    """The first columns of an index."""
    return (
        np.array(images["id"], np.int64)[order],
        np.array(images["height"], np.int32)[order],
        np.array(images["width"], np.int32)[order],
        Texts([images["file_name"][i] for i in order]),
    )


def _read_image(path: Path, record: Any, images: dict[str, Any]) -> None:
    try:
        values = int(record["id"]), int(record["height"]), int(record["width"]), str(record["file_name"])
        if min(values[1:3]) < 1:
            raise ValueError
        for column, value in zip(images.values(), values, strict=True):
            column.append(value)
    except KeyError as error:
        raise DataError(f"{path}: image {record.get('id', 'without id')} has no {error}: complete its record") from None
    except (TypeError, ValueError, OverflowError):
        raise DataError(
            f"{path}: {str(record)[:80]} is no image record as COCO writes it: correct its id, height and width"
        ) from None


def _read_annotation(path: Path, record: Any, annotations: dict[str, Any], segments: dict[str, "array[int]"]) -> None:
    known = record if isinstance(record, dict) else {}
    where = f"{path}: the annotation of image {known.get('image_id', '?')}"
    segment: Any = None
    try:
        image_id, png_name, infos = int(record["image_id"]), str(record["file_name"]), record["segments_info"]
        for segment in infos:
            box = segment.get("bbox") or (0, 0, 2, 2)
            segments["id"].append(segment["id"])
            segments["category_id"].append(segment["category_id"])
            segments["is_crowd"].append(bool(segment.get("iscrowd", 0)))
            segments["wide"].append(box[2] > 1 and box[3] > 1)
        for column, value in zip(annotations.values(), (image_id, png_name, len(infos)), strict=True):
            column.append(value)
    except KeyError as error:
        which = f" has a segment {segment.get('id', '')} that" if segment else ""
        raise DataError(f"{where}{which} has no {error}: complete its record") from None
    except (TypeError, ValueError, OverflowError, AttributeError, IndexError):
        raise DataError(f"{where} is malformed near {str(segment or record)[:80]}") from None


def _assemble(
    path: Path,
    categories: Categories,
    images: dict[str, Any],
    annotations: dict[str, Any],
    segments: dict[str, "array[int]"],
) -> PanopticIndex:
    image_order = _image_order(path, images)
    image_ids = np.array(images["id"], np.int64)[image_order]
    annotated = np.array(annotations["image_id"], np.int64)
    order = np.argsort(annotated, kind="stable")
    _check_annotated(path, image_ids, annotated[order])
    counts = np.array(annotations["count"], np.int64)
    ends = np.concatenate([[0], np.cumsum(counts)])
    rows = _rows_in_order(ends, order)
    offsets = np.concatenate([[0], np.cumsum(counts[order])])
    ids, category_ids, is_crowd, wide = (np.array(column)[rows] for column in segments.values())
    is_crowd = is_crowd.astype(bool)
    owner = np.repeat(image_ids, np.diff(offsets))
    _check_segments(path, owner, ids)
    semantic_ids = _semantic_ids(path, categories, owner, ids, category_ids)
    return PanopticIndex(
        path,
        *_in_order(images, image_order),
        png_names=Texts([annotations["file_name"][i] for i in order]),
        offsets=offsets,
        segment_ids=ids.astype(np.int32),
        semantic_ids=semantic_ids,
        is_crowd=is_crowd,
        has_box=wide.astype(bool) & ~is_crowd & (semantic_ids >= categories.num_stuff),
    )


def _check_annotated(path: Path, image_ids: Ints, annotated: Ints) -> None:
    """Both lists ascending."""
    _check_distinct(path, annotated, "annotations")
    if len(lonely := np.setdiff1d(image_ids, annotated)):
        raise DataError(f"{path}: image {lonely[0]} has no annotation ({len(lonely)} such images): remove or label it")
    if len(lonely := np.setdiff1d(annotated, image_ids)):
        raise DataError(f"{path}: there is an annotation of image {lonely[0]}, but no such image in the list")


def _check_distinct(path: Path, ids: Ints, what: str) -> None:
    """ids: ascending."""
    if len(doubled := ids[1:][ids[1:] == ids[:-1]]):
        raise DataError(f"{path}: image id {doubled[0]} occurs twice among the {what}: remove one of the two")


def _check_segments(path: Path, owner: Ints, ids: Ints) -> None:
    if len(bad := np.flatnonzero((ids < 1) | (ids > MAX_SEGMENT_ID))):
        i = bad[0]
        raise DataError(f"{path}: image {owner[i]}: segment id {ids[i]} must lie in 1..{MAX_SEGMENT_ID} (0 is void)")
    order = np.lexsort((ids, owner))
    same = (owner[order][1:] == owner[order][:-1]) & (ids[order][1:] == ids[order][:-1])
    if len(doubled := np.flatnonzero(same)):
        i = order[doubled[0]]
        raise DataError(f"{path}: image {owner[i]}: segment id {ids[i]} is given twice: every segment needs its own id")


def _semantic_ids(path: Path, categories: Categories, owner: Ints, ids: Ints, category_ids: Ints) -> NDArray[np.int16]:
    known, position = np.unique(category_ids, return_inverse=True)
    table = np.array([categories.semantic_id(c) if c in categories else -1 for c in known.tolist()], np.int16)
    semantic_ids = table[position]
    if len(unknown := np.flatnonzero(semantic_ids < 0)):
        i = unknown[0]
        raise DataError(
            f"{path}: image {owner[i]}: segment {ids[i]} has category {category_ids[i]}, which is not in the "
            f"categories list: add the category or correct the segment"
        )
    return semantic_ids


def _rows_in_order(ends: Ints, order: Ints) -> Ints:
    """Indices that put groups of consecutive rows (ends[g]:ends[g+1]) into another order of groups."""
    counts = np.diff(ends)[order]
    first = np.cumsum(counts) - counts
    return np.repeat(ends[:-1][order] - first, counts) + np.arange(counts.sum())


def bytes_of(index: Any) -> int:
    """Memory of the arrays that are fields of a dataclass."""
    return sum(getattr(getattr(index, field.name), "nbytes", 0) for field in fields(index))
