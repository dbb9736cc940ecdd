"""`upsnet prepare`: data sets as their owners give them out, checked and made ready."""

from pathlib import Path

from upsnet.structures.errors import DataError


def prepare_coco(folder: Path, deep: bool = False) -> None:
    """Checks a COCO tree; nothing in it is changed.

    Raises:
        DataError: it cannot be used as it is.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder: put COCO there or give its path")
