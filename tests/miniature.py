"""Writes a miniature panoptic data set in the official COCO layout, for tests of any room.

Image kinds, in turn: 0 things and stuff; 1 with a strip of void; 2 with a crowd; 3 stuff only; 4 things only;
5 a grey-scale photo with a 1-pixel thing. Ids are odd on purpose: category ids have gaps and are not in order, image
ids have gaps and the json lists images from last to first, segment ids use all three bytes.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

CATEGORIES = [
    {"id": 90, "name": "ball", "supercategory": "toy", "isthing": 1, "color": [220, 20, 60]},
    {"id": 7, "name": "grass", "supercategory": "ground", "isthing": 0, "color": [40, 180, 60]},
    {"id": 12, "name": "box", "supercategory": "toy", "isthing": 1, "color": [30, 60, 230]},
    {"id": 200, "name": "sky", "supercategory": "air", "isthing": 0, "color": [120, 190, 250]},
    {"id": 3, "name": "kite", "supercategory": "toy", "isthing": 1, "color": [250, 210, 30]},
]
"""Three things (ball, box, kite), two stuff classes; semantic ids: grass 0, sky 1, ball 2, box 3, kite 4."""

STUFF, THINGS = (7, 200), (90, 12, 3)


def image_id_of(position: int) -> int:
    """The image id of the position-th image in ascending order."""
    return 7 * position + 3


def write_miniature(
    folder: Path,
    image_set: str = "train",
    images: int = 6,
    size: tuple[int, int] = (48, 64),
    seed: int = 0,
    instances: bool = False,
) -> Path:
    """Writes `images` photos with panoptic labels and returns `folder`.

    Files: images/<set>/*.jpg, annotations/panoptic_<set>.json, annotations/panoptic_<set>/*.png and, with `instances`,
    annotations/instances_<set>.json (rectangles as polygons, crowds as RLE). Every third photo is upright.

    Args:
        size: height and width in pixels (at least 24) of photos that lie.
    """
    records: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "instances": []}
    for position in range(images):
        height, width = size if position % 3 != 2 else size[::-1]
        draws = np.random.default_rng((seed, position))
        regions = _regions(position % 6, height, width, draws)
        _write_image(Path(folder), image_set, position, (height, width), regions, records, draws)
    annotations = Path(folder) / "annotations"
    write_json(
        annotations / f"panoptic_{image_set}.json",
        {"images": records["images"][::-1], "annotations": records["annotations"], "categories": CATEGORIES},
    )
    if instances:
        things = [{"id": c["id"], "name": c["name"]} for c in CATEGORIES if c["isthing"]]
        write_json(
            annotations / f"instances_{image_set}.json",
            {"images": records["images"], "annotations": records["instances"], "categories": things},
        )
    return Path(folder)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@contextmanager
def edited(path: Path) -> Iterator[Any]:
    """The content of a json file, written back at the end of the `with` block."""
    content = json.loads(path.read_text())
    yield content
    write_json(path, content)


Region = tuple[int, int, bool, tuple[int, int, int, int]]
"""Segment id, category id, crowd, (x, y, width, height) of a rectangle; later ones cover earlier ones."""


def _regions(kind: int, height: int, width: int, draws: np.random.Generator) -> list[Region]:
    half = height // 2
    things = [int(c) for c in draws.permutation(THINGS)]
    ball = (257, things[0], False, (2, 3, width // 3, half))
    box = (65536 * 3 + 5, things[1], False, (width // 2, half - 4, width // 3, half - 2))
    ground = (41, STUFF[0], False, (0, half, width, height - half))
    sky = (70000, STUFF[1], False, (0, 0, width, half))
    if kind == 1:
        return [(41, STUFF[0], False, (0, half, width - 6, height - half)), sky, ball]
    if kind == 2:
        return [ground, sky, (999, things[2], True, (width - 14, 2, 12, 16)), ball, box]
    if kind == 3:
        return [ground, sky]
    if kind == 4:
        return [(256, things[0], False, (0, 0, width, half)), (512, things[1], False, (0, half, width, height - half))]
    dot = [(300, things[2], False, (width - 2, height - 2, 1, 1))] if kind == 5 else []
    return [ground, sky, ball, box, *dot]


def _write_image(
    folder: Path,
    image_set: str,
    position: int,
    size: tuple[int, int],
    regions: list[Region],
    records: dict[str, list[dict[str, Any]]],
    draws: np.random.Generator,
) -> None:
    height, width = size
    color_of = {c["id"]: c["color"] for c in CATEGORIES}
    photo = np.full((height, width, 3), 90, dtype=np.int64)
    ids = np.zeros((height, width), dtype=np.int64)
    for segment_id, category_id, _, (x, y, w, h) in regions:
        ids[y : y + h, x : x + w] = segment_id
        photo[y : y + h, x : x + w] = color_of[category_id]
    photo = (photo + draws.integers(-12, 13, photo.shape)).clip(0, 255).astype(np.uint8)
    photo = photo.mean(axis=2).astype(np.uint8) if position % 6 == 5 else photo[..., ::-1]
    image_id = image_id_of(position)
    photo_path = folder / "images" / image_set / f"{image_id:012d}.jpg"
    png_path = folder / "annotations" / f"panoptic_{image_set}" / f"{image_id:012d}.png"
    for path in (photo_path, png_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(photo_path), photo)
    cv2.imwrite(str(png_path), np.stack([ids >> 16, ids >> 8 & 255, ids & 255], axis=-1).astype(np.uint8))
    records["images"].append({"id": image_id, "file_name": photo_path.name, "height": height, "width": width})
    segments = [_segment_record(ids == region[0], region) for region in regions]
    records["annotations"].append({"image_id": image_id, "file_name": png_path.name, "segments_info": segments})
    for region, segment in zip(regions, segments, strict=True):
        if region[1] in THINGS:
            annotation_id = len(records["instances"]) + 1
            record = {**segment, "id": annotation_id, "image_id": image_id}
            record["segmentation"] = _segmentation(region, ids == region[0])
            records["instances"].append(record)


def _segment_record(mask: np.ndarray, region: Region) -> dict[str, Any]:
    segment_id, category_id, is_crowd, _ = region
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    return {
        "id": segment_id,
        "category_id": category_id,
        "iscrowd": int(is_crowd),
        "area": int(mask.sum()),
        "bbox": [int(value) for value in box],
    }


def _segmentation(region: Region, mask: np.ndarray) -> Any:
    _, _, is_crowd, (x, y, w, h) = region
    if is_crowd:
        rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        return {"size": rle["size"], "counts": rle["counts"].decode()}
    return [[float(v) for v in (x, y, x + w, y, x + w, y + h, x, y + h)]]
