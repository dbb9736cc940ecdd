"""Reading and writing json so that a user gets one sentence on failure, and never half a file under its final name."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from upsnet.structures.errors import DataError, PlaceError
from upsnet.structures.places import not_written, remove, replacing


def write_json(path: Path, content: Any) -> None:
    """Writes `content` at once.

    Raises:
        PlaceError: the folder cannot be written or the disk is full.
    """
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """The content of a json file.

    Raises:
        PlaceError: there is no such file, or it cannot be read.
        DataError: it holds no json.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PlaceError(f"cannot read {path}: {error.strerror or error}: check the path") from error
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not a text file: write or download it anew") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: is not valid json (line {error.lineno}: {error.msg}): write or download it anew"
        ) from None


class JsonListWriter:
    """Writes a json list record by record, one a line; the file gets its name only by `close`."""

    def __init__(self, path: Path, head: str = "[") -> None:
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._empty = True
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: TextIO = self._part.open("w", encoding="utf-8")
            self._file.write(head)
        except OSError as error:
            raise not_written(path, error) from error

    def write(self, record: dict[str, Any]) -> None:
        try:
            self._file.write(("\n" if self._empty else ",\n") + json.dumps(record))
        except OSError as error:
            self.discard()
            raise not_written(self._path, error) from error
        self._empty = False

    def close(self, tail: str = "]") -> None:
        """Ends the list and gives the file its name."""
        try:
            self._file.write(f"\n{tail}\n")
            self._file.close()
            os.replace(self._part, self._path)
        except OSError as error:
            self.discard()
            raise not_written(self._path, error) from error

    def discard(self) -> None:
        """Leaves nothing behind, for instance after an error elsewhere; after `close` it does nothing."""
        with suppress(OSError):  # closing writes what is left; that the disk is full is being reported already
            self._file.close()
        remove(self._part)


class JsonListReader:
    """Reads what `JsonListWriter` wrote, record by record."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._next: dict[str, Any] | None = None
        try:
            self._file: TextIO = path.open(encoding="utf-8")
        except OSError as error:
            why = error.strerror or error
            raise PlaceError(f"cannot read {path}: {why}: run the test without --eval_only") from error
        self._file.readline()
        self._advance()

    def of_image(self, image_id: int) -> list[dict[str, Any]]:
        """The records of the next image, which must be this one if it has any."""
        records = []
        while self._next is not None and self._next["image_id"] == image_id:
            records.append(self._next)
            self._advance()
        return records

    def check_end(self) -> None:
        """To be called after the last image.

        Raises:
            DataError: a record is left: it belongs to no image, or to one in another order.
        """
        self._file.close()
        if self._next is not None:
            raise DataError(
                f"{self._path}: the records of image {self._next['image_id']} do not follow the order of the images: "
                f"run the test without --eval_only"
            )

    def _advance(self) -> None:
        try:
            line = self._file.readline().strip()
            self._next = None if line == "]" else json.loads(line.removesuffix(","))
        except (UnicodeDecodeError, json.JSONDecodeError):
            raise DataError(f"{self._path}: is damaged or incomplete: run the test without --eval_only") from None
        if line != "]" and not (isinstance(self._next, dict) and "image_id" in self._next):
            raise DataError(f"{self._path}: a record has no 'image_id': run the test without --eval_only")
