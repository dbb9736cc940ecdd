"""Which snapshots of a folder belong to the run that goes on in it, and which of them is best: `snapshots.json`.

A folder may still have snapshots of an earlier run that this one replaces, with higher numbers. Nothing goes on from
those by itself, and none of them is removed.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from upsnet.structures.errors import WeightsError
from upsnet.structures.places import sync_folder, write_temporary, writing

FILE_NAME = "snapshots.json"


@dataclass(frozen=True, slots=True)
class RunRecord:
    """launch: names of the launch in which the run goes on, none for a plain one. iterations: of its snapshots,
    ascending. best, pq: the one of them with the best panoptic quality × 100; None before a test."""

    launch: Sequence[str] = ()
    iterations: Sequence[int] = ()
    best: int | None = None
    pq: float | None = None

    def write(self, folder: Path) -> None:
        """Replaces the record of the folder.

        Raises:
            PlaceError: it cannot be written.
        """
        path = folder / FILE_NAME
        content = {"launch": list(self.launch), "snapshots": list(self.iterations), "best": self.best, "pq": self.pq}
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            os.replace(write_temporary(path, json.dumps(content).encode()), path)
            sync_folder(folder)


def read_run_record(folder: Path) -> RunRecord | None:
    """The record of a folder; None: there is none.

    Raises:
        WeightsError: it is damaged.
    """
    path = folder / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return RunRecord(
            list(content["launch"]), sorted(map(int, content["snapshots"])), content["best"], content["pq"]
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path} is damaged: remove it, then every snapshot beside it counts") from error
