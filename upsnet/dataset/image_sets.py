"""Which files make up an image set: the official COCO layout, and the names of COCO's image sets."""

from dataclasses import dataclass
from pathlib import Path

from upsnet.dataset.index_cache import index_folder
from upsnet.dataset.shards import shards_index
from upsnet.structures.errors import DataError


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Where the files of one image set lie. Without an instances json, things come from the panoptic PNGs.

    index_dir: where the indexes of large jsons are kept; None: nowhere. shards: index of the tars that hold photos and
    labels in place of the two folders; None: there are none.
    """

    panoptic_json: Path
    png_dir: Path
    image_dir: Path
    instances_json: Path | None = None
    index_dir: Path | None = None
    shards: Path | None = None


@dataclass(frozen=True, slots=True)
class UnlabelledImageSet:
    """Where the files of an image set without labels lie; the json lists the photos (`images`) and nothing else.

    shards: as for an `ImageSet`.
    """

    info_json: Path
    image_dir: Path
    shards: Path | None = None


PHOTOS_OF = {
    "minival2014": "val2014",
    "valminusminival2014": "val2014",
    "test-dev2015": "test2015",
    "test-dev2017": "test2017",
}
"""COCO's image sets whose photos lie in the folder of another one."""

WITHOUT_LABELS = ("test2015", "test-dev2015", "test2017", "test-dev2017")
"""COCO's image sets whose labels are kept by the evaluation server."""

SINCE_2017 = {
    "train2014": "train2017",
    "val2014": "train2017+val2017",
    "minival2014": "val2017",
    "valminusminival2014": "train2017",
}
"""Where the photos of COCO's older sets have been since 2017. For the older sets there are no panoptic labels."""


def coco_image_sets(dataset_path: Path, image_set: str) -> list[ImageSet | UnlabelledImageSet]:
    """The sets that `image_set` names, joined by `+`, in the official COCO layout under `dataset_path`.

    images/<set>/, annotations/panoptic_<set>.json, annotations/panoptic_<set>/ and, if it is there,
    annotations/instances_<set>.json. A set without labels has annotations/image_info_<set>.json instead.

    Raises:
        DataError: COCO has no panoptic labels for a set, and the user has put none there.
    """
    return [_coco_image_set(Path(dataset_path), name) for name in image_set.split("+")]


def _coco_image_set(dataset_path: Path, name: str) -> ImageSet | UnlabelledImageSet:
    annotations = dataset_path / "annotations"
    panoptic, info = annotations / f"panoptic_{name}.json", annotations / f"image_info_{name}.json"
    image_dir = _image_dir(dataset_path, PHOTOS_OF.get(name, name))
    if not panoptic.exists() and (name in WITHOUT_LABELS or info.exists()):
        return UnlabelledImageSet(info, image_dir, shards_index(dataset_path, name))
    if name in SINCE_2017 and not panoptic.exists():
        raise DataError(
            f"{panoptic}: is not there, and COCO gives out no panoptic labels for {name}: {SINCE_2017[name]} "
            f"holds the same photos, take that, or put labels of your own there"
        )
    instances = annotations / f"instances_{name}.json"
    return ImageSet(
        panoptic_json=panoptic,
        png_dir=annotations / f"panoptic_{name}",
        image_dir=image_dir,
        instances_json=instances if instances.exists() else None,
        index_dir=index_folder(dataset_path),
        shards=shards_index(dataset_path, name),
    )


def _image_dir(dataset_path: Path, folder: str) -> Path:
    """images/<folder>; COCO's older photos may also lie in coco_<folder>, as the original UPSNet expects them."""
    older = dataset_path / f"coco_{folder}"
    return older if older.is_dir() else dataset_path / "images" / folder
