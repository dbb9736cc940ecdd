"""One address → one `.part` file beside its destination, over lines that break: resumed, tried again, never mixed."""

import http.client
import json
import os
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from upsnet.checkpoints.manifest import Source
from upsnet.structures.places import remove, writing

CHUNK = 1 << 20
LARGEST = 4 << 30
"""No weight file comes near this many bytes; a server that sends more without saying how many sends something else."""

PAGES = (b"<!", b"<h", b"<?")
"""How web pages begin, and no weight file."""

HEADERS = {"User-Agent": "upsnet", "Accept-Encoding": "identity"}


@dataclass(frozen=True, slots=True)
class Patience:
    """attempts: in a row that bring nothing. timeout: in seconds, to connect and between two pieces. wait: in seconds,
    after the first failure; each further one doubles it."""

    attempts: int = 5
    timeout: float = 15.0
    wait: float = 1.0


class TransferError(Exception):
    """An address does not give the file; the message says why in a few words. The next address may."""


class _InterruptedError(Exception):
    """It broke off, or the server is busy: worth another attempt."""


class _UnreachableError(_InterruptedError):
    """The server cannot be reached: worth another attempt only where it was reached a moment ago."""


@dataclass(frozen=True, slots=True)
class _Origin:
    """What the bytes of a `.part` file belong to: kept beside it, so that only the same file is ever continued.

    validator: the server's own mark of this version (a strong ETag, else Last-Modified). total: bytes of the file.
    """

    url: str
    validator: str | None
    total: int | None


def part_of(destination: Path, source: Source) -> Path:
    """Where the pieces of a source gather: beside the destination, under the source's own name."""
    return destination.with_name(PurePosixPath(urlsplit(source.url).path).name + ".part")


def fetch(source: Source, part: Path, patience: Patience) -> None:
    """Downloads a source into `part`, going on where an earlier attempt stopped if the file is still the same.

    Raises:
        TransferError: this address does not give it.
        PlaceError: the disk does not take it.
    """
    begun = most = _size(part)
    failures = 0
    with writing(part):
        part.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            return _transfer(source, part, patience.timeout)
        except _InterruptedError as error:
            size = _size(part)
            failures = 1 if size > most else failures + 1
            most = max(most, size)
            if isinstance(error, _UnreachableError) and most == begun:
                raise TransferError(str(error)) from error
            if failures >= patience.attempts:
                raise TransferError(f"{error}, {failures} times in a row") from error
        time.sleep(patience.wait * 2 ** (failures - 1))


def discard(part: Path) -> None:
    """Removes a `.part` file with what is known of it."""
    remove(part)
    remove(_origin_file(part))


def any_answers(urls: Iterable[str], seconds: float) -> bool:
    """Whether at least one of these addresses answers at all within `seconds`, whatever it says."""
    answers: SimpleQueue[bool] = SimpleQueue()
    # Looking up a host's name has no time limit of its own, hence threads that nobody waits for.
    threads = [Thread(target=_ask, args=(url, seconds, answers), daemon=True) for url in urls]
    end = time.monotonic() + seconds
    for thread in threads:
        thread.start()
    try:
        return any(answers.get(timeout=max(end - time.monotonic(), 0.01)) for _ in threads)
    except Empty:
        return False


def _ask(url: str, seconds: float, answers: "SimpleQueue[bool]") -> None:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD", headers=HEADERS), timeout=seconds):
            answers.put(True)
    except urllib.error.HTTPError:
        answers.put(True)
    except (OSError, http.client.HTTPException, ValueError):
        answers.put(False)


def _transfer(source: Source, part: Path, timeout: float) -> None:
    origin = _known_origin(source, part)
    if origin and _size(part) == origin.total:
        return
    headers = dict(HEADERS)
    if origin:
        headers["Range"] = f"bytes={_size(part)}-"
        if origin.validator:
            headers["If-Range"] = origin.validator
    with _open(source.url, headers, part, timeout) as response:
        start = _start(response, origin, source, part)
        length = response.headers.get("Content-Length", "")
        total = origin.total if origin and start else int(length) if length.isdigit() else None
        first = _read(response, None if total is None else total - start)
        if not start:
            _check_kind(response, first, total, source)
            _write_origin(part, _Origin(source.url, _validator(response), total))
        got = _receive(response, first, part, start, total)
    if got > LARGEST:
        discard(part)
        raise TransferError(f"sends more than {LARGEST} bytes")
    if total is not None and got < total:
        raise _InterruptedError(f"cut the line after {got} of {total} bytes")


def _check_kind(response: Any, first: bytes, total: int | None, source: Source) -> None:
    """Refuses at once what cannot be the file: a web page, which many servers send instead, or another size."""
    if response.headers.get_content_type() == "text/html" or first.lstrip()[:2].lower() in PAGES:
        raise TransferError("answers with a web page instead of the file")
    if source.size and total is not None and total != source.size:
        raise TransferError(f"has a file of {total} bytes instead of {source.size}")


def _start(response: Any, origin: _Origin | None, source: Source, part: Path) -> int:
    """The byte at which the answer begins; 0 unless it goes on exactly where the part ends, in the same version."""
    if response.status != http.client.PARTIAL_CONTENT:
        return 0
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    begins, total = (int(match[1]), int(match[2])) if match else (-1, -1)
    validator = _validator(response)
    if (
        origin is None
        or (begins, total) != (_size(part), origin.total)
        or (validator != origin.validator and not (validator is None and source.sha256))
    ):
        discard(part)
        raise _InterruptedError("gives a file that has changed since the download began")
    return begins


def _receive(response: Any, first: bytes, part: Path, start: int, total: int | None) -> int:
    """Appends what arrives, up to `total` bytes; returns the size that the part then has."""
    got, data = start, first
    bar = tqdm(total=total, initial=start, desc=part.stem, unit="B", unit_scale=True, dynamic_ncols=True)
    with writing(part), open(part, "ab" if start else "wb") as file, bar:
        while data and got <= LARGEST:
            file.write(data)
            got += len(data)
            bar.update(len(data))
            data = _read(response, None if total is None else total - got)
        file.flush()
        os.fsync(file.fileno())
    return got


def _open(url: str, headers: dict[str, str], part: Path, timeout: float) -> Any:
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            discard(part)
        if error.code in (408, 416, 425, 429) or error.code >= 500:
            raise _InterruptedError(f"HTTP {error.code}") from error
        raise TransferError(f"HTTP {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise TransferError(_words(error.reason)) from error
        raise _UnreachableError(_words(error.reason)) from error
    except TimeoutError as error:
        raise _UnreachableError(_words(error)) from error
    except (OSError, http.client.HTTPException) as error:
        raise _InterruptedError(_words(error)) from error
    except ValueError as error:
        raise TransferError("is no address") from error


def _read(response: Any, most: int | None) -> bytes:
    """The next piece, of at most so many bytes; empty at the end."""
    try:
        data: bytes = response.read1(CHUNK if most is None else min(CHUNK, most))
        return data
    except (OSError, http.client.HTTPException) as error:
        raise _InterruptedError(_words(error)) from error


def _words(error: object) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, socket.gaierror):
        return "the host is not found"
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def _validator(response: Any) -> str | None:
    etag = response.headers.get("ETag")
    # A weak ETag may stand for two files that differ in bytes.
    mark: str | None = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
    return mark


def _known_origin(source: Source, part: Path) -> _Origin | None:
    """What is known of a part that may be continued: same address, and a way to tell that the file is the same."""
    try:
        origin = _Origin(**json.loads(_origin_file(part).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    may_go_on = origin.url == source.url and origin.total is not None and (origin.validator or source.sha256)
    return origin if may_go_on and _size(part) else None


def _write_origin(part: Path, origin: _Origin) -> None:
    with writing(part):
        remove(part)  # first, so that old bytes never lie beside the new origin
        _origin_file(part).write_text(json.dumps(asdict(origin)), encoding="utf-8")


def _origin_file(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0
