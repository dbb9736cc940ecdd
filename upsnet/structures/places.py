"""Writing to disk: whole or not at all, and one clear sentence when a place does not take it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from upsnet.structures.errors import PlaceError


def not_written(path: Path, error: OSError) -> PlaceError:
    """The sentence for a file or folder that could not be written."""
    return PlaceError(
        f"cannot write {path}: {error.strerror or error}: make room or choose a folder that can be written"
    )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError inside into a PlaceError that names the path."""
    try:
        yield
    except OSError as error:
        raise not_written(path, error) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` when the block ends well, else it is removed.

    Raises:
        PlaceError: the folder cannot be written or the disk is full.
    """
    part = path.with_name(path.name + ".part")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            os.replace(part, path)
        except BaseException:
            remove(part)
            raise


def remove(path: Path) -> None:
    """Removes a file, if it is there and can be removed."""
    with suppress(OSError):  # a folder that cannot be written holds nothing of ours either
        path.unlink(missing_ok=True)


def write_temporary(path: Path, *data: bytes | memoryview) -> Path:
    """Writes `data`, one part after the other, to a temporary file beside `path`; rename it to `path` to make it count.

    The file is on the disk when this returns.

    Raises:
        OSError: it could not be written; then the temporary file is gone again.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for part in data:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        remove(temporary)
        raise
    return temporary


def sync_folder(folder: Path) -> None:
    """Makes renames in this folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
