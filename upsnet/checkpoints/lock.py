"""The lock file beside the weights: checksums that no one published, as they were when the files came."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from upsnet.structures.errors import WeightsError
from upsnet.structures.places import replacing

LOCK = "weights.lock.json"


@dataclass(frozen=True, slots=True)
class Record:
    """Checksum and size in bytes of a file, and the address it came from ("" of a file that was found in its place)."""

    sha256: str
    size: int
    source: str


def sha256_of(path: Path) -> str:
    """The checksum of a file, as 64 hexadecimal digits.

    Raises:
        WeightsError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror or error}): check its permissions") from error


def read_lock(folder: Path) -> Mapping[str, Record]:
    """The records by the files' paths below `folder`; empty where there is no lock file.

    Raises:
        WeightsError: it is damaged.
    """
    path = folder / LOCK
    try:
        return {name: Record(**record) for name, record in json.loads(path.read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is damaged or cannot be read: delete it to record the checksums anew") from error


def write_record(folder: Path, name: str, record: Record) -> None:
    """Adds or replaces one record.

    Raises:
        WeightsError: the lock file is damaged.
        PlaceError: it cannot be written.
    """
    records = {**read_lock(folder), name: record}
    with replacing(folder / LOCK) as part:
        part.write_text(json.dumps({name: asdict(record) for name, record in records.items()}, indent=2) + "\n")
