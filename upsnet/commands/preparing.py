"""`upsnet prepare`: data sets as their owners give them out, checked and made ready."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from upsnet.dataset import cityscapes_preparation
from upsnet.dataset.coco_check import SetReport, check_coco
from upsnet.dataset.shard_writing import write_shards
from upsnet.engine.log import logging_to
from upsnet.structures.errors import DataError


def prepare_coco(folder: Path, deep: bool = False) -> None:
    """Checks a COCO tree and reports on each image set; nothing in it is changed. See `check_coco`.

    Raises:
        DataError: something is missing or wrong.
    """
    with logging_to(None), _reading():
        reports = check_coco(folder, deep)
    for report in reports:
        print(f"{report.name}: {_state(report)}")
        for fault in report.faults:
            print(f"  FAULT: {fault}")
        for note in report.notes:
            print(f"  note: {note}")
    if faulty := [report.name for report in reports if report.faults]:
        raise DataError(f"{folder}: {' and '.join(faulty)} cannot be used as they are: see the faults above")
    print(f"ready: train and test with dataset.dataset_path={folder}")


def shard_coco(folder: Path, out: Path) -> None:
    """Writes the image sets of a COCO tree as shards, a few large tar files; nothing in the tree is changed.

    Raises:
        DataError: files are missing or cut off.
        PlaceError: `out` cannot be written.
    """
    with _reading():
        counts = write_shards(folder, out)
    for name, photos in counts.items():
        print(f"{name}: {photos} photos in shards")
    print(f"ready: train and test with dataset.dataset_path={out}")


def _state(report: SetReport) -> str:
    if report.photos is None:
        return "not readable" if report.faults else "not checked"
    return f"{report.photos} photos, {'not ready' if report.faults else 'ready'}"


def prepare_cityscapes(folder: Path) -> None:
    """Checks a Cityscapes tree and adds what training and testing read; no official file is changed.

    Raises:
        DataError: files are missing or damaged, or photos and labels do not fit each other.
        PlaceError: the tree cannot be written.
    """
    with _reading():
        counts = cityscapes_preparation.prepare_cityscapes(folder)
    for split, photos in counts.items():
        print(f"{split}: {photos} photos, ready")


@contextmanager
def _reading() -> Iterator[None]:
    """Files and folders that the user may not read, anywhere in a data set."""
    try:
        yield
    except PermissionError as error:
        raise DataError(
            f"{error.filename}: cannot be read ({error.strerror}): give yourself the right to read the data set"
        ) from None
