"""Writes a miniature Cityscapes in the exact official layout from generated street scenes.

Only the polygons and the photos are ours; label, instance and colour images are derived from the polygons by the
official tools. Every scene holds all eight thing classes, groups, instances that are not scored (caravan, trailer),
borders without label, a deleted object, and a building with a hole that later polygons make.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from cityscapesscripts.helpers.annotation import Annotation
from cityscapesscripts.helpers.labels import name2label
from cityscapesscripts.preparation.json2instanceImg import createInstanceImage
from cityscapesscripts.preparation.json2labelImg import createLabelImage
from PIL import Image, ImageDraw

CITIES = {
    "train": ("aachen", "bochum"),
    "val": ("frankfurt", "munster"),
    "test": ("berlin",),
    "train_extra": ("bamberg",),
    "demoVideo": ("stuttgart_00",),
}
THINGS = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
PHOTO_COLORS = {"unlabeled": (90, 90, 90), "static": (60, 50, 60), "license plate": (240, 240, 240)}
"""Colours of labels that the official table paints black."""

Scene = list[tuple[str, list[list[int]]]]
"""Labels with their polygons; later ones cover earlier ones."""


def write_miniature_cityscapes(
    folder: Path, *, size: tuple[int, int] = (128, 256), seed: int = 0, **images: int
) -> Path:
    """Writes `images` photos a split (e.g. train=4, val=2) in turn to its cities, with their labels; returns `folder`.

    As in the official archives, the labels of `test` are dummies and `demoVideo` has none.

    Args:
        size: height and width in pixels.
    """
    for split, count in images.items():
        for position in range(count):
            city = CITIES[split][position % len(CITIES[split])]
            stem = f"{city}_{position // len(CITIES[split]):06d}_{19 + 30 * position:06d}"
            draws = np.random.default_rng((seed, *split.encode(), position))
            scene = street(draws, *size)
            photo = folder / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png"
            photo.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photograph(scene, draws, *size)).save(photo)
            if split != "demoVideo":
                kind = "gtCoarse" if split == "train_extra" else "gtFine"
                shown = [entry for entry in scene if entry[0] in ("out of roi", "ego vehicle")]
                write_labels(folder / kind / split / city / f"{stem}_{kind}", shown if split == "test" else scene, size)
    return folder


def write_labels(start: Path, scene: Scene, size: tuple[int, int]) -> None:
    """The four official label files of one photo. start: their path up to what follows `_gtFine`."""
    start.parent.mkdir(parents=True, exist_ok=True)
    objects = [{"label": label, "polygon": polygon} for label, polygon in scene]
    deleted = {"label": "sky", "polygon": [[0, 0], [size[1], 0], [0, size[0]]], "deleted": 1}
    polygons = start.with_name(f"{start.name}_polygons.json")
    polygons.write_text(json.dumps({"imgHeight": size[0], "imgWidth": size[1], "objects": [*objects, deleted]}))
    derive(polygons)


def derive(polygons: Path) -> None:
    """The label, instance and colour image of a polygons json, by the official tools."""
    annotation = Annotation()
    annotation.fromJsonFile(str(polygons))

    def target(kind: str) -> Path:
        return polygons.with_name(polygons.name.replace("polygons.json", f"{kind}.png"))

    createLabelImage(annotation, "ids").save(target("labelIds"))
    createLabelImage(annotation, "color").save(target("color"))
    # The official files have 16 bits; Pillow itself no longer writes 32-bit pictures as PNG.
    instances = np.asarray(createInstanceImage(annotation, "ids")).astype(np.uint16)
    Image.fromarray(instances).save(target("instanceIds"))


def photograph(scene: Scene, draws: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A picture of a scene, H×W×3 uint8: every object in a shade of its class, and noise."""
    picture = Image.new("RGB", (width, height), PHOTO_COLORS["unlabeled"])
    pen = ImageDraw.Draw(picture)
    for label, polygon in scene:
        name = label if label in name2label else label.removesuffix("group")
        color = PHOTO_COLORS.get(name, name2label[name].color)
        shade = tuple(int(c) for c in np.clip(np.array(color) + draws.integers(-25, 26, 3), 0, 255))
        pen.polygon([tuple(corner) for corner in polygon], fill=shade)
    noisy = np.asarray(picture, dtype=np.int64) + draws.integers(-8, 9, (height, width, 3))
    return noisy.clip(0, 255).astype(np.uint8)


def street(draws: np.random.Generator, height: int, width: int) -> Scene:
    """The objects of a scene, from back to front."""
    horizon, curb = int(height * 0.4), int(height * 0.55)
    scene = [
        ("sky", box(0, 0, width, horizon)),
        ("building", box(0, 4, width * 0.45, curb)),
        ("sky", box(width * 0.1, 10, width * 0.1 + 14, 24)),  # seen through the building: a hole in its polygon
        ("vegetation", blob(draws, width * 0.65, horizon * 0.7, width * 0.15, horizon * 0.5)),
        ("terrain", box(width * 0.45, horizon, width, curb)),
        ("wall", box(width * 0.8, horizon * 0.8, width, curb)),
        ("fence", box(width * 0.5, horizon, width * 0.6, curb)),
        ("sidewalk", box(0, curb, width, height)),
        ("road", [[int(width * 0.3), curb], [int(width * 0.7), curb], [width, height], [0, height]]),
        ("parking", box(width * 0.9, curb, width, curb + 12)),
        ("pole", box(width * 0.47, horizon * 0.2, width * 0.47 + 3, curb + 6)),
        ("traffic light", box(width * 0.455, horizon * 0.2, width * 0.455 + 10, horizon * 0.2 + 14)),
        ("traffic sign", box(width * 0.62, horizon * 0.5, width * 0.62 + 9, horizon * 0.5 + 9)),
        ("static", box(width * 0.02, curb - 4, width * 0.02 + 8, curb + 6)),
        ("cargroup", box(width * 0.72, curb - 8, width * 0.85, curb + 4)),
        ("persongroup", box(width * 0.3, curb - 12, width * 0.36, curb + 2)),
        ("bicyclegroup", box(width * 0.05, curb, width * 0.1, curb + 10)),
    ]
    scene += traffic(draws, height, width, curb)
    return [
        *scene,
        ("rectification border", box(0, 0, width, 2)),
        ("out of roi", box(0, 0, 3, height)),
        ("out of roi", box(width - 3, 0, width, height)),
        ("ego vehicle", [[int(width * 0.25), height], [int(width * 0.4), height - 8], [int(width * 0.75), height]]),
    ]


def traffic(draws: np.random.Generator, height: int, width: int, curb: int) -> Iterator[tuple[str, list[list[int]]]]:
    """Things from far to near: all classes once, some again, so that they cover each other."""
    again = draws.choice(["person", "car", "bicycle", "rider", "caravan", "trailer"], 6).tolist()
    kinds = draws.permutation([*THINGS, "caravan", *again]).tolist()
    for foot, kind in zip(np.sort(draws.uniform(curb + 4, height - 4, len(kinds))).tolist(), kinds, strict=True):
        near = 0.5 + (foot - curb) / (height - curb)
        x = draws.uniform(4, width * 0.9)
        wide, high = (9, 26) if kind in ("person", "rider") else (24, 16) if "cycle" in kind else (40, 22)
        wide, high = wide * near * draws.uniform(0.7, 1.3), high * near
        if kind in ("person", "rider"):
            yield kind, blob(draws, x + wide / 2, foot - high / 2, wide / 2, high / 2)
        else:
            yield kind, box(x, foot - high, x + wide, foot)
        if kind == "car":
            yield "license plate", box(x + wide * 0.4, foot - 5, x + wide * 0.6, foot - 3)


def box(x1: float, y1: float, x2: float, y2: float) -> list[list[int]]:
    return [[int(x), int(y)] for x, y in ((x1, y1), (x2, y1), (x2, y2), (x1, y2))]


def blob(draws: np.random.Generator, x: float, y: float, rx: float, ry: float) -> list[list[int]]:
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    radii = draws.uniform(0.8, 1.1, 12)
    return [[int(x + rx * r * np.cos(a)), int(y + ry * r * np.sin(a))] for a, r in zip(angles, radii, strict=True)]
