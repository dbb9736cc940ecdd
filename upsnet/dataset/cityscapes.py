"""Where things lie in a Cityscapes tree: the official layout, and what `upsnet prepare cityscapes` adds to it.

Official: leftImg8bit/<split>/<city>/<stem>_leftImg8bit.png and, for each photo, gtFine/<split>/<city>/<stem>_gtFine_
{polygons.json,labelIds.png,instanceIds.png,color.png}; stem = <city>_<sequence>_<frame>. The labels of train_extra are
coarse (gtCoarse), those of test are dummies, demoVideo has none.

Added where the official tools put it: gtFine/<split>/<city>/<stem>_gtFine_labelTrainIds.png,
gtFine/cityscapes_panoptic_<split>.json and the PNGs in the folder of that name.

Added for our reader, with numbers as image ids: annotations/panoptic_<split>.json (its PNGs are the official ones),
annotations/instances_<split>.json and, for photos without labels, annotations/image_info_<split>.json.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from upsnet.dataset.image_sets import ImageSet, UnlabelledImageSet
from upsnet.dataset.index_cache import index_folder
from upsnet.structures.errors import DataError
from upsnet.structures.pictures import read_grey_png

WITHOUT_LABELS = ("test", "demoVideo")
"""Splits whose photos are not labelled, or whose labels only the evaluation server has."""

_PHOTO_ENDING = "_leftImg8bit.png"


@dataclass(frozen=True, slots=True)
class Split:
    """The paths of one split (train, val, test, train_extra, demoVideo) of the tree at `root`.

    Photos are named as in results: <city>/<stem>_leftImg8bit.png.
    """

    root: Path
    name: str

    @property
    def has_labels(self) -> bool:
        return self.name not in WITHOUT_LABELS

    @property
    def kind(self) -> str:
        """gtFine or gtCoarse."""
        return "gtCoarse" if self.name == "train_extra" else "gtFine"

    @property
    def photo_dir(self) -> Path:
        return self.root / "leftImg8bit" / self.name

    @property
    def label_dir(self) -> Path:
        return self.root / self.kind / self.name

    @property
    def official_json(self) -> Path:
        """The panoptic json of the official converter; its PNGs lie in `png_dir`."""
        return self.root / self.kind / f"cityscapes_panoptic_{self.name}.json"

    @property
    def png_dir(self) -> Path:
        return self.official_json.with_suffix("")

    @property
    def panoptic_json(self) -> Path:
        return self.root / "annotations" / f"panoptic_{self.name}.json"

    @property
    def instances_json(self) -> Path:
        return self.root / "annotations" / f"instances_{self.name}.json"

    @property
    def info_json(self) -> Path:
        return self.root / "annotations" / f"image_info_{self.name}.json"

    def photos(self) -> list[str]:
        """The photos on disk, by city and stem."""
        found = self.photo_dir.glob(f"*/*{_PHOTO_ENDING}")
        return sorted(path.relative_to(self.photo_dir).as_posix() for path in found)

    def label(self, photo: str, what: str) -> Path:
        """A label file of a photo. what: polygons.json, labelIds.png, instanceIds.png, color.png, labelTrainIds.png."""
        return self.label_dir / f"{photo.removesuffix(_PHOTO_ENDING)}_{self.kind}_{what}"

    def labelled(self, what: str) -> set[str]:
        """The photos for which there is a label file of this kind, whether they are there themselves or not."""
        ending = f"_{self.kind}_{what}"
        found = (path.relative_to(self.label_dir).as_posix() for path in self.label_dir.glob(f"*/*{ending}"))
        return {name.removesuffix(ending) + _PHOTO_ENDING for name in found}

    def panoptic_png(self, photo: str) -> Path:
        return self.png_dir / f"{stem_of(photo)}_{self.kind}_panoptic.png"


def stem_of(photo: str) -> str:
    """<city>_<sequence>_<frame> of a photo's name: how Cityscapes' evaluation names an image."""
    return Path(photo).name.removesuffix(_PHOTO_ENDING)


def cityscapes_image_sets(dataset_path: Path, image_set: str) -> list[ImageSet | UnlabelledImageSet]:
    """The splits that `image_set` names, joined by `+`, of a prepared tree.

    Raises:
        DataError: there is no such split, or it was not prepared.
    """
    return [_image_set(Split(Path(dataset_path), name)) for name in image_set.split("+")]


def instance_id_reader(dataset_path: Path, image_set: str) -> Callable[[str], NDArray[Any]]:
    """A function from a photo's name to its official instance-id image, H×W uint16.

    Values: label id × 1000 + number for a single thing, the label id for everything else, groups of things included.
    """
    splits = [Split(Path(dataset_path), name) for name in image_set.split("+")]

    def read(photo: str) -> NDArray[Any]:
        paths = [split.label(photo, "instanceIds.png") for split in splits]
        return read_grey_png(next((path for path in paths if path.exists()), paths[0]))

    return read


def _image_set(split: Split) -> ImageSet | UnlabelledImageSet:
    if not split.photo_dir.is_dir():
        raise DataError(
            f"{split.photo_dir}: there is no such folder: check dataset.dataset_path and the image set; "
            f"./init_cityscapes.sh --help says what Cityscapes consists of"
        )
    prepared = split.panoptic_json if split.has_labels else split.info_json
    if not prepared.exists():
        raise DataError(
            f"{prepared}: there is no such file: prepare this Cityscapes tree with ./init_cityscapes.sh {split.root}"
        )
    if not split.has_labels:
        return UnlabelledImageSet(split.info_json, split.photo_dir)
    kept = index_folder(split.root)
    return ImageSet(split.panoptic_json, split.png_dir, split.photo_dir, split.instances_json, kept)
