"""The results of a test on several workers: each stores its own photos, rank 0 puts the records together.

A worker writes the PNGs of its photos where they stay, and one record a photo into `parts/N.json` of the result folder:
what the json files hold of it, and what the evaluators measured. Rank 0, whose `ResultWriter` is there from the
beginning to the end, reads the parts side by side, a photo at a time.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from upsnet.evaluation.json_files import JsonListReader, JsonListWriter
from upsnet.evaluation.result_files import parts_folder, write_pngs
from upsnet.structures.categories import Categories
from upsnet.structures.errors import DataError, PlaceError
from upsnet.structures.results import Prediction


class PartWriter:
    """Writes the results of one worker. Use it as a context: the part has its name after it, or is gone after an error.

    The part can be seen, unfinished, from the beginning on: see `check_parts`.
    """

    def __init__(self, folder: Path, worker: int, png_names: Mapping[int, str], categories: Categories) -> None:
        """
        Args:
            folder: of the results, where all workers write.
            png_names: of every image id.

        Raises:
            PlaceError: the folder cannot be written.
        """
        self._folder, self._png_names, self._categories = folder, png_names, categories
        self._list = JsonListWriter(_part(folder, worker))

    def add(self, prediction: Prediction, measured: Mapping[str, Any]) -> None:
        """Writes the PNGs of one photo and its record. measured: what json holds, by evaluator.

        Raises:
            PlaceError: the folder cannot be written or the disk is full.
        """
        image_id = prediction.image_id
        stored = write_pngs(self._folder, prediction, self._png_names[image_id], self._categories)
        self._list.write({"image_id": image_id, "stored": stored, "measured": measured})

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._list.close()
        else:
            self._list.discard()


def check_parts(folder: Path, workers: int) -> None:
    """To be called by rank 0 when all have opened their parts, before they work for hours.

    Raises:
        PlaceError: a part is not to be seen.
    """
    for worker in range(workers):
        path = _part(folder, worker)
        if not path.with_name(path.name + ".part").exists() and not path.exists():
            raise PlaceError(
                f"{path}: the results of worker {worker} do not arrive where worker 0 runs: "
                f"set output_path to a folder that all machines share"
            )


def read_parts(folder: Path, workers: int, image_ids: Iterable[int]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """What is stored and what was measured of each image, in the given order, which is that of each part.

    Raises:
        PlaceError: a part cannot be read.
        DataError: an image is in no part or in two, or a part is damaged.
    """
    parts = [JsonListReader(_part(folder, worker)) for worker in range(workers)]
    for image_id in image_ids:
        records = [record for part in parts for record in part.of_image(image_id)]
        if len(records) != 1:
            raise DataError(f"{folder}: {len(records)} workers have stored image {image_id}: run the test again")
        yield records[0]["stored"], records[0]["measured"]
    for part in parts:
        part.check_end()


def _part(folder: Path, worker: int) -> Path:
    return parts_folder(folder) / f"{worker}.json"
