"""`upsnet prepare`: data sets as their owners give them out, checked and made ready."""

from pathlib import Path

from upsnet.dataset import cityscapes_preparation
from upsnet.structures.errors import DataError


def prepare_coco(folder: Path, deep: bool = False) -> None:
    """Checks a COCO tree; nothing in it is changed.

    Raises:
        DataError: it cannot be used as it is.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder: put COCO there or give its path")


def prepare_cityscapes(folder: Path) -> None:
    """Checks a Cityscapes tree and adds what training and testing read; no official file is changed.

    Raises:
        DataError: files are missing or damaged, or photos and labels do not fit each other.
        PlaceError: the tree cannot be written.
    """
    for split, photos in cityscapes_preparation.prepare_cityscapes(folder).items():
        print(f"{split}: {photos} photos, ready")
