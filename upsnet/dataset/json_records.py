"""Reads a large annotation json record by record, so that its 450 MB never stand in memory as Python objects."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from upsnet.structures.errors import DataError

_SPACE = re.compile(r"\s*")
_CHUNK = 1 << 22
_LARGE = 100 << 20


def records_of(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields what the json object at `path` holds: (key, entry) for every entry of a list, (key, value) for the rest.

    Files that take more than a few seconds show a progress bar.

    Raises:
        DataError: the file is missing, unreadable or not a json object.
    """
    try:
        size = Path(path).stat().st_size
        # Text lengths stand in for bytes: annotation files are ASCII but for a name here and there.
        bar = tqdm(total=size, unit="B", unit_scale=True, desc=Path(path).name, disable=size < _LARGE, leave=False)
        with open(path, encoding="utf-8") as file, bar:
            yield from _Scanner(file, bar.update).records()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check dataset.dataset_path") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise DataError(f"{path}: is not a valid json file ({error}): copy or download it again") from None


class _Scanner:
    """A window that moves over the text; the standard decoder reads one value after another from it."""

    def __init__(self, file: TextIO, report: Callable[[int], object]) -> None:
        self._file = file
        self._report = report
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._position = 0

    def records(self) -> Iterator[tuple[str, Any]]:
        self._expect("{")
        if self._peek() == "}":
            self._expect("}")
        else:
            yield from self._pairs()
        if rest := self._peek_or_end():
            raise ValueError(f"found {rest!r} after its end")

    def _pairs(self) -> Iterator[tuple[str, Any]]:
        while True:
            key = self._value()
            self._expect(":")
            if self._peek() == "[":
                for entry in self._entries():
                    yield key, entry
            else:
                yield key, self._value()
            if self._expect(",}") == "}":
                return

    def _entries(self) -> Iterator[Any]:
        self._expect("[")
        if self._peek() == "]":
            self._expect("]")
            return
        while True:
            yield self._value()
            if self._expect(",]") == "]":
                return

    def _read_on(self) -> bool:
        # Twice the pending text: a record that is cut off is found after few tries, however long it is.
        pending = self._text[self._position :]
        more = self._file.read(max(_CHUNK, len(pending)))
        self._text, self._position = pending + more, 0
        self._report(len(more))
        return bool(more)

    def _peek(self) -> str:
        found = self._peek_or_end()
        if not found:
            raise ValueError("it ends too early")
        return found

    def _peek_or_end(self) -> str:
        """The next character that is no space; at the end of the file nothing."""
        while True:
            match = _SPACE.match(self._text, self._position)
            self._position = match.end() if match else self._position
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._read_on():
                return ""

    def _expect(self, allowed: str) -> str:
        found = self._peek()
        if found not in allowed:
            raise ValueError(f"found {found!r} where {' or '.join(allowed)} should stand")
        self._position += 1
        return found

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                if self._read_on():
                    continue
                raise ValueError(error.msg) from None
            # A number at the edge of the window may go on beyond it.
            if end == len(self._text) and self._read_on():
                continue
            self._position = end
            return value
