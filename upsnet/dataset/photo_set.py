"""One image set on disk as far as it needs no labels: its list of photos, and the photos themselves."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from upsnet.dataset.index import ImageIndex
from upsnet.structures.errors import DataError
from upsnet.structures.pictures import read_photo


class PhotoSet:
    """The photos that an index lists. `row` numbers them by ascending image id."""

    def __init__(self, image_dir: Path, index: ImageIndex) -> None:
        check_folder(image_dir)
        self.image_dir, self.index = Path(image_dir), index

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
            return read_photo(self.image_dir / self.index.photo_names[row], self.size(row))
        except DataError as error:
            raise DataError(f"image {self.index.image_ids[row]}: {error}") from None


def check_folder(folder: Path) -> None:
    """Refuses a folder of photos or labels that is not there."""
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: there is no such folder: check dataset.dataset_path and image_set")
