"""The ways in which the network sees a photo at test time: at several scales, as it is and mirrored."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from upsnet.dataset.coco_panoptic import CocoPanoptic
from upsnet.dataset.transforms import Transform, padded_size, scaled_size
from upsnet.structures.sample import Sample


@dataclass(frozen=True, slots=True)
class Views:
    """Every photo at each scale and, with `flip`, mirrored as well.

    The first scale, not mirrored, is the reference: the sample itself, on which the network fuses the others. Scales
    that the longest side makes the same for a photo are seen once.

    transforms: each of one scale, at least one.
    """

    transforms: Sequence[Transform]
    flip: bool = False

    @property
    def count(self) -> int:
        """How often the network sees a photo at most."""
        return len(self.transforms) * (2 if self.flip else 1)

    def sample(self, photo: NDArray[np.uint8], image_id: int = 0, file_name: str = "") -> Sample:
        """photo: H×W×3 uint8 RGB.

        Raises:
            DataError: the photo is so thin that nothing would be left of it.
        """
        height, width = photo.shape[:2]
        samples = []
        for transform, scale in self._distinct(height, width, image_id).values():
            for flipped in (False, True)[: 2 if self.flip else 1]:
                image = transform.image(photo[:, ::-1] if flipped else photo, scale)
                samples.append(Sample(image_id, file_name, image, (height, width), scale, flipped))
        return replace(samples[0], views=samples[1:])

    def padded_sizes(self, height: int, width: int, image_id: int = 0) -> tuple[tuple[int, int], ...]:
        """The sizes, scale by scale, that `collate` gives to a photo alone: photos of a batch must agree in all.

        Raises:
            DataError: as in `sample`.
        """
        return tuple(padded_size(size) for size in self._distinct(height, width, image_id))

    def _distinct(self, height: int, width: int, image_id: int) -> dict[tuple[int, int], tuple[Transform, float]]:
        """The sizes at which a photo is seen, each with the first transform and scale that lead to it."""
        found: dict[tuple[int, int], tuple[Transform, float]] = {}
        for transform in self.transforms:
            scale = transform.scale(height, width, image_id)
            found.setdefault(scaled_size(height, width, scale), (transform, scale))
        return found


class PhotoViews(Dataset[Sample]):
    """The photos of a data set in all views, without targets."""

    def __init__(self, photos: CocoPanoptic, views: Views) -> None:
        self._photos, self._views = photos, views
        self._ids, self._names = photos.image_ids.tolist(), photos.file_names

    def __len__(self) -> int:
        return self._photos.num_photos

    def __getitem__(self, i: int) -> Sample:
        return self._views.sample(self._photos.photo(i), self._ids[i], self._names[i])

    def padded_sizes(self) -> list[tuple[tuple[int, int], ...]]:
        """Of each photo, for `SamePaddedSizeSampler`."""
        return [
            self._views.padded_sizes(height, width, image_id)
            for (height, width), image_id in zip(self._photos.sizes.tolist(), self._ids, strict=True)
        ]
