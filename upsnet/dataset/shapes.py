"""The synthetic panoptic data set `shapes`, written in the COCO panoptic layout.

    out/images/{train,val}/000000000001.jpg …
    out/annotations/panoptic_{train,val}.json
    out/annotations/panoptic_{train,val}/000000000001.png …

Six thing classes differ by silhouette alone, six stuff classes by texture and place; colours, sizes and light are
random. Image i of a split is a function of (seed, split, i) and of nothing else.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from upsnet.dataset.shapes_drawing import SILHOUETTES, TEXTURES
from upsnet.dataset.shapes_scene import Scene, draw_scene
from upsnet.structures.categories import Categories, Category
from upsnet.structures.errors import DataError, PlaceError
from upsnet.structures.panoptic_png import id_to_rgb
from upsnet.structures.pictures import encode_jpeg, encode_png
from upsnet.structures.places import not_written
from upsnet.structures.results import segments_of

SPLITS = ("train", "val")
SMALLEST_SIDE = 96
_VERSION = 1  # counts up with every change that changes a pixel
_JPEG_QUALITY = 95
_FIRST_STUFF_ID = 11
_COLORS = {
    "disk": (220, 60, 60),
    "ring": (240, 150, 40),
    "triangle": (240, 220, 60),
    "star": (200, 80, 220),
    "cross": (90, 90, 240),
    "bar": (60, 210, 230),
    "sky": (150, 200, 240),
    "hills": (110, 130, 90),
    "water": (40, 100, 170),
    "field": (200, 180, 110),
    "tiles": (150, 150, 160),
    "meadow": (90, 180, 80),
}


def shapes_categories() -> Categories:
    """The class table: things 1..6, stuff 11..16."""
    things = [Category(i, name, True, _COLORS[name]) for i, name in enumerate(SILHOUETTES, start=1)]
    stuff = [Category(i, name, False, _COLORS[name]) for i, name in enumerate(TEXTURES, start=_FIRST_STUFF_ID)]
    return Categories(things + stuff)


def write_shapes(out: Path, train: int, val: int, seed: int, size: tuple[int, int] = (192, 256)) -> None:
    """Writes the set, or returns at once if the very same set is already there.

    The set grows in a hidden folder beside `out` and gets its name when it is whole.

    Args:
        out: the new folder; it may exist if it is empty.
        train, val: number of images of each split.
        seed: not negative; the same seed gives the same bytes.
        size: height and width of every image, pixels.

    Raises:
        DataError: a count, the seed or the size is impossible.
        PlaceError: `out` holds something else, or cannot be written.
    """
    if min(train, val, seed) < 0:
        raise DataError(f"shapes: train ({train}), val ({val}) and seed ({seed}) must not be negative")
    if min(size) < SMALLEST_SIDE:
        raise DataError(f"shapes: images of {size[0]}×{size[1]} are too small, take at least {SMALLEST_SIDE} a side")
    parameters = {"version": _VERSION, "train": train, "val": val, "seed": seed, "size": list(size)}
    out = out.resolve()
    try:
        if _already_there(out, parameters):
            return
        growing = out.parent / f".{out.name}.{os.getpid()}"
        try:
            for split, count in zip(SPLITS, (train, val), strict=True):
                _write_split(growing, split, count, parameters)
            growing.rename(out)
        finally:
            shutil.rmtree(growing, ignore_errors=True)
    except OSError as error:
        raise not_written(out, error) from None


def _already_there(out: Path, parameters: dict[str, Any]) -> bool:
    """True for the same set, False for nothing; PlaceError for anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    for split in SPLITS:
        try:
            found = json.loads((out / "annotations" / f"panoptic_{split}.json").read_text())["info"]["parameters"]
        except (OSError, ValueError, KeyError, TypeError):
            found = None
        photos, labels = out / "images" / split, out / "annotations" / f"panoptic_{split}"
        counts = [len(list(folder.glob("*.*"))) for folder in (photos, labels)]
        if found != parameters or counts != [parameters[split]] * 2:
            raise PlaceError(
                f"{out} holds something else than this shapes data set: delete it or choose another folder"
            )
    return True


def _write_split(root: Path, split: str, count: int, parameters: dict[str, Any]) -> None:
    photos, labels = root / "images" / split, root / "annotations" / f"panoptic_{split}"
    photos.mkdir(parents=True)
    labels.mkdir(parents=True)
    height, width = parameters["size"]
    images, annotations = [], []
    for image_id in tqdm(range(1, count + 1), desc=f"shapes {split}", unit="image"):
        rng = np.random.default_rng([parameters["seed"], SPLITS.index(split), image_id])
        scene = draw_scene(rng, (height, width))
        segment_map, segments = _label(rng, scene)
        photo, png = f"{image_id:012d}.jpg", f"{image_id:012d}.png"
        (photos / photo).write_bytes(encode_jpeg(scene.image, _JPEG_QUALITY))
        (labels / png).write_bytes(encode_png(id_to_rgb(segment_map)))
        images.append({"id": image_id, "file_name": photo, "height": height, "width": width})
        annotations.append({"image_id": image_id, "file_name": png, "segments_info": segments})
    document = {
        "info": {"description": "UPSNet shapes, a synthetic panoptic data set", "parameters": parameters},
        "images": images,
        "annotations": annotations,
        "categories": sorted(shapes_categories().to_coco(), key=lambda record: record["id"]),
    }
    (root / "annotations" / f"panoptic_{split}.json").write_text(json.dumps(document))


def _label(rng: np.random.Generator, scene: Scene) -> tuple[NDArray[np.int32], list[dict[str, Any]]]:
    """Segment ids near the colour of their class, as COCO's are, and the records of the segments."""
    categories = {category.name: category for category in shapes_categories()}
    ids = [0]
    for piece in scene.pieces:
        segment_id = 0
        while segment_id in ids:
            red, green, blue = categories[piece.kind].color + rng.integers(-15, 16, 3)
            segment_id = int(red + 256 * green + 65536 * blue)
        ids.append(segment_id)
    segment_map = np.array(ids, dtype=np.int32)[scene.labels + 1]
    pieces = dict(zip(ids[1:], scene.pieces, strict=True))
    records = []
    for segment in segments_of(segment_map, dict.fromkeys(ids, 0)):
        piece = pieces[segment.id]
        records.append(
            {
                "id": segment.id,
                "category_id": categories[piece.kind].id,
                "area": segment.area,
                "bbox": list(segment.bbox),
                "iscrowd": int(piece.is_crowd),
            }
        )
    return segment_map, records
