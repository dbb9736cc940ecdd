"""Writing to disk: whole or not at all, and one clear sentence when a place does not take it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from upsnet.structures.errors import PlaceError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError inside into a PlaceError that names the path."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise PlaceError(f"{path} cannot be written ({reason}): make room or choose another output_path") from error


def write_temporary(path: Path, data: bytes | memoryview) -> Path:
    """Writes `data` to a temporary file beside `path`, down to the disk; rename it to `path` to make it count.

    Raises:
        OSError: it could not be written; then the temporary file is gone again.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def sync_folder(folder: Path) -> None:
    """Makes renames in this folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
