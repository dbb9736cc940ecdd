"""Is a Cityscapes tree complete? Names what is missing and where to get it."""

import logging
from collections.abc import Iterator
from pathlib import Path

from upsnet.dataset.cityscapes import Split, stem_of
from upsnet.structures.errors import DataError

logger = logging.getLogger("upsnet")

SOURCE = "https://www.cityscapes-dataset.com/downloads (free of charge after registration)"

OFFICIAL_COUNTS = {"train": 2975, "val": 500, "test": 1525, "train_extra": 19998}

NEEDED = ("polygons.json", "labelIds.png", "instanceIds.png")
"""The label files that preparation and evaluation read; the fourth, color.png, is for looking at."""


def check_tree(root: Path) -> list[Split]:
    """The splits of a tree that can be used. Whatever is missing gets a line in the log.

    Raises:
        DataError: there is no such tree, it has neither train nor val, or a split is incomplete.
    """
    photos = root / "leftImg8bit"
    advice = f"unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip in {root}; they are at {SOURCE}"
    if not photos.is_dir():
        raise DataError(f"{photos}: there is no such folder: {advice}")
    splits = []
    for name in ("train", "val", *sorted({path.name for path in photos.iterdir() if path.is_dir()} - {"train", "val"})):
        split = Split(root, name)
        if why := _unusable(split):
            logger.warning("%s: %s: left out", name, why)
        else:
            splits.append(split)
    if not {"train", "val"} & {split.name for split in splits}:
        raise DataError(f"{root}: holds photos and labels neither of train nor of val: {advice}")
    problems = [problem for split in splits for problem in _missing(split)]
    for problem in problems:
        logger.warning("%s", problem)
    if problems:
        raise DataError(f"{root}: this Cityscapes tree is incomplete ({problems[0]}): {advice}")
    for split in splits:
        expected, found = OFFICIAL_COUNTS.get(split.name), len(split.photos())
        if expected not in (None, found):
            logger.warning("%s: %d photos, the official set has %d", split.name, found, expected)
    return splits


def _unusable(split: Split) -> str:
    """Why a split is left out, or nothing."""
    if not split.photos():
        return f"there are no photos in {split.photo_dir}/CITY"
    # Who has photos of train or val needs their labels; they are in one small archive.
    if split.has_labels and split.name not in ("train", "val") and not split.label_dir.is_dir():
        return f"there is no folder {split.label_dir}"
    return ""


def _missing(split: Split) -> Iterator[str]:
    """One sentence for each kind of file that some photos lack."""
    if not split.has_labels:
        return
    photos = split.photos()
    for what in NEEDED:
        labelled = split.labelled(what)
        for missing, lacking in (
            ([photo for photo in photos if photo not in labelled], f"photos lack their {split.kind}_{what}"),
            (sorted(labelled.difference(photos)), f"files {split.kind}_{what} lack their photo"),
        ):
            if missing:
                cities = sorted({Path(photo).parent.name for photo in missing})
                yield f"{split.name}: {len(missing)} {lacking}, in {', '.join(cities)}, first {stem_of(missing[0])}"
