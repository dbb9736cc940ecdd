"""One image set on disk as far as it needs no labels: its list of photos, and the photos themselves."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from upsnet.dataset.image_sets import ImageSet, UnlabelledImageSet
from upsnet.dataset.index import ImageIndex
from upsnet.dataset.shards import ShardFolder, open_shards
from upsnet.structures.errors import DataError
from upsnet.structures.pictures import read_photo


class PhotoSet:
    """The photos that an index lists. `row` numbers them by ascending image id."""

    def __init__(self, photos: Path | ShardFolder, index: ImageIndex) -> None:
        check_folder(photos)
        self.photos, self.index = photos, index

    @property
    def nbytes(self) -> int:
        """Memory of the index in bytes."""
        return self.index.nbytes

    def size(self, row: int) -> tuple[int, int]:
        """Height and width by the json."""
        return int(self.index.heights[row]), int(self.index.widths[row])

    def photo(self, row: int) -> NDArray[np.uint8]:
        """H×W×3 uint8 RGB in the size of the json."""
        try:
            return read_photo(self.photos / self.index.photo_names[row], self.size(row))
        except DataError as error:
            raise DataError(f"image {self.index.image_ids[row]}: {error}") from None


def photo_folder(files: ImageSet | UnlabelledImageSet) -> Path | ShardFolder:
    """Where the photos of an image set are.

    Raises:
        DataError: they are in shards, which are not whole.
    """
    return files.image_dir if files.shards is None else open_shards(files.shards).photos


def check_folder(folder: Path | ShardFolder) -> None:
    """Refuses a folder of photos or labels that is not there."""
    if isinstance(folder, Path) and not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder: check dataset.dataset_path and image_set")
