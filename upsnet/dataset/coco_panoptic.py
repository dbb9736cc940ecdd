"""Data sets in the COCO panoptic format: photos, a panoptic json with its PNG folder, optionally an instances json.

Sets whose labels are kept by a server (COCO test-dev) have a json that lists their photos, and no truth.
Nothing is rewritten on disk: the order of the classes and their numbers are derived in memory.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from upsnet.dataset.annotated_set import AnnotatedSet
from upsnet.dataset.batches import Draw
from upsnet.dataset.image_sets import ImageSet, UnlabelledImageSet
from upsnet.dataset.index import index_images
from upsnet.dataset.photo_set import PhotoSet, photo_folder
from upsnet.dataset.transforms import Transform, padded_size, quarter_masks, resize_labels, scaled_size
from upsnet.structures.categories import Categories
from upsnet.structures.errors import DataError
from upsnet.structures.results import Truth
from upsnet.structures.sample import Instances, Sample, Targets

logger = logging.getLogger("upsnet")


class CocoPanoptic(Dataset[Sample]):
    """Photos with panoptic labels, in ascending image id (set after set where there are several).

    `dataset[i]` is a `Sample` for the network; `truth(i)` and `photo(i)` are the untouched labels and photo. An index
    may be a `Draw`, whose step then governs the drawn scale. With `flip_copies`, entries N … 2N-1 are the mirrored
    photos.
    """

    def __init__(
        self,
        image_sets: ImageSet | UnlabelledImageSet | Sequence[ImageSet | UnlabelledImageSet],
        transform: Transform | None = None,
        *,
        targets: bool = True,
        flip_copies: bool = False,
        skip_without_things: bool = False,
        limit: int | None = None,
        min_area: float = -1,
        crowds: bool = True,
        categories: Categories | None = None,
    ) -> None:
        """Args:
            image_sets: the files; see `coco_image_sets`.
            transform: needed for `dataset[i]` only.
            targets: samples carry targets (else the labels are not read for them).
            skip_without_things: leave out photos without a single usable thing, as training does.
            limit: only the first photos, in ascending image id, counted before any is left out.
            min_area: instances with a smaller area in the instances json are no targets.
            crowds: targets hold groups of things, marked as such; False: they hold single things only.
            categories: the class table for sets without labels; labelled sets bring their own.

        Raises:
            DataError: files are missing or broken, contradict each other, lack what is asked of them, or no photo is
                left.
        """
        files = list(image_sets) if isinstance(image_sets, Sequence) else [image_sets]
        self.transform, self.targets, self.flip_copies = transform, targets, flip_copies
        self._min_area, self._crowds = min_area, crowds
        self._sets = [_open(each) for each in files]
        _check_together(self._sets)
        if (targets or skip_without_things) and not self.has_truth:
            raise DataError(
                f"{self._sets[0].index.source}: these photos have no labels to train or to form validation losses on: "
                f"choose another image set, or train.eval_data=false"
            )
        self.categories = self._class_table(categories)
        lengths = [len(each.index) for each in self._sets]
        self._set_of = np.repeat(np.arange(len(lengths), dtype=np.int16), lengths)[:limit]
        self._row_of = np.concatenate([np.arange(length) for length in lengths])[:limit]
        if len(self._row_of) == 0:
            raise DataError(f"{self._sets[0].index.source}: no image is left to read: check dataset.limit")
        if skip_without_things:
            self._skip_without_things()

    @property
    def has_truth(self) -> bool:
        """Whether there are labels: `truth(i)` and targets."""
        return isinstance(self._sets[0], AnnotatedSet)

    @property
    def num_photos(self) -> int:
        """N, the number of photos without their mirrored copies."""
        return len(self._row_of)

    @property
    def image_ids(self) -> NDArray[np.int64]:
        """N image ids."""
        return self._gather([each.index.image_ids for each in self._sets])

    @property
    def sizes(self) -> NDArray[np.int64]:
        """N×2, height and width of each photo as the json gives them."""
        heights = self._gather([each.index.heights for each in self._sets])
        widths = self._gather([each.index.widths for each in self._sets])
        return np.stack([heights, widths], axis=1).astype(np.int64)

    @property
    def file_names(self) -> list[str]:
        """N file names of photos, as the json gives them."""
        return [each.index.photo_names[row] for each, row in map(self._where, range(self.num_photos))]

    @property
    def nbytes(self) -> int:
        """Memory of the index in bytes."""
        return int(sum(each.nbytes for each in self._sets) + self._set_of.nbytes + self._row_of.nbytes)

    def padded_sizes(self, stride: int = 32) -> list[tuple[int, int]]:
        """The N sizes that `collate` gives to photos that are alone in their batch (for `SamePaddedSizeSampler`)."""
        transform = self._need_transform()
        return [
            padded_size(scaled_size(height, width, transform.scale(height, width, image_id)), stride)
            for (height, width), image_id in zip(self.sizes.tolist(), self.image_ids.tolist(), strict=True)
        ]

    def __len__(self) -> int:
        return self.num_photos * (2 if self.flip_copies else 1)

    def __getitem__(self, index: int | Draw) -> Sample:
        entry, step = index if isinstance(index, tuple) else (index, 0)
        if not 0 <= entry < len(self):
            raise IndexError(f"entry {entry} of {len(self)}")
        transform = self._need_transform()
        flipped, i = entry >= self.num_photos, entry % self.num_photos
        photos, row = self._where(i)
        photo = photos.photo(row)
        height, width = photos.size(row)
        image_id = int(photos.index.image_ids[row])
        scale = transform.scale(height, width, image_id, step, flipped)
        return Sample(
            image_id=image_id,
            file_name=photos.index.photo_names[row],
            image=transform.image(photo[:, ::-1] if flipped else photo, scale),
            original_size=(height, width),
            scale=scale,
            flipped=flipped,
            targets=self._targets(i, scale, flipped) if self.targets else None,
        )

    def photo(self, i: int) -> NDArray[np.uint8]:
        """Photo i, H×W×3 uint8 RGB, in the size of the json."""
        photos, row = self._where(i)
        return photos.photo(row)

    def truth(self, i: int) -> Truth:
        """The labels of photo i, unscaled. Annotation ids that are made up are distinct over the whole data set."""
        annotated, row = self._labelled(i)
        before = sum(len(each.index.segment_ids) for each in self._annotated_sets()[: self._set_of[i]])
        return annotated.truth(row, 1 + before + int(annotated.index.offsets[row]))

    def _targets(self, i: int, scale: float, flipped: bool) -> Targets:
        annotated, row = self._labelled(i)
        labels = annotated.labels(row)
        height, width = annotated.size(row)
        semantic_map = labels.semantic_map()
        instances = annotated.instances(row, labels, self._min_area)
        if not self._crowds:
            instances = instances.without_crowd()
        if flipped:
            semantic_map = np.ascontiguousarray(semantic_map[:, ::-1])
            instances = _mirrored(instances, width)
        size = scaled_size(height, width, scale)
        planes = quarter_masks(instances.without_crowd().masks, size, scale)
        return Targets(
            instances=instances,
            semantic=torch.from_numpy(resize_labels(semantic_map, scale)),
            quarter_masks=torch.from_numpy(planes),
        )

    def _skip_without_things(self) -> None:
        usable = self._gather([each.has_usable_thing(self._min_area) for each in self._annotated_sets()])
        if not usable.any():
            raise DataError(
                f"{self._sets[0].index.source}: none of {len(usable)} images has a single thing with a usable box: "
                f"there is nothing to train instances on"
            )
        if not usable.all():
            left_out, total = int((~usable).sum()), len(usable)
            logger.info("%d of %d images have no single thing with a usable box: left out of training", left_out, total)
        self._set_of, self._row_of = self._set_of[usable], self._row_of[usable]

    def _gather(self, columns: list[NDArray[Any]]) -> NDArray[Any]:
        """Values of all sets' images (one array a set) → values of this data set's photos."""
        starts = np.cumsum([0, *(len(column) for column in columns[:-1])])
        return np.concatenate(columns)[starts[self._set_of] + self._row_of]

    def _where(self, i: int) -> tuple[PhotoSet, int]:
        return self._sets[self._set_of[i]], int(self._row_of[i])

    def _labelled(self, i: int) -> tuple[AnnotatedSet, int]:
        photos, row = self._where(i)
        if not isinstance(photos, AnnotatedSet):
            image_id, source = photos.index.image_ids[row], photos.index.source
            raise DataError(f"image {image_id} has no labels: {source} lists photos only; choose a labelled image set")
        return photos, row

    def _annotated_sets(self) -> list[AnnotatedSet]:
        return [each for each in self._sets if isinstance(each, AnnotatedSet)]

    def _class_table(self, given: Categories | None) -> Categories:
        first = self._sets[0]
        if isinstance(first, AnnotatedSet):
            return first.categories
        if given is None:
            raise DataError(
                f"{first.index.source}: photos without labels do not say which classes there are: name a data set "
                f"whose classes are known (dataset.dataset=coco), or add the panoptic json"
            )
        return given

    def _need_transform(self) -> Transform:
        if self.transform is None:
            raise TypeError("this data set was made without a transform: it has truth and photos, but no samples")
        return self.transform


def _mirrored(instances: Instances, width: int) -> Instances:
    x1, y1, x2, y2 = instances.boxes.unbind(dim=1)
    boxes = torch.stack([width - x2 - 1, y1, width - x1 - 1, y2], dim=1)
    return Instances(boxes, instances.classes, instances.is_crowd, instances.masks.flip(width))


def _open(files: ImageSet | UnlabelledImageSet) -> PhotoSet:
    if isinstance(files, ImageSet):
        return AnnotatedSet(files)
    return PhotoSet(photo_folder(files), index_images(files.info_json))


def _check_together(sets: Sequence[PhotoSet]) -> None:
    """Sets that are joined must all have labels or none, one class table, and no image id in common."""
    for i, later in enumerate(sets):
        for earlier in sets[:i]:
            with_labels = [each for each in (earlier, later) if isinstance(each, AnnotatedSet)]
            if len(with_labels) == 1:
                raise DataError(
                    f"{later.index.source} and {earlier.index.source}: one set has labels and the other has none: "
                    f"test them one after the other"
                )
            if with_labels and with_labels[0].categories != with_labels[1].categories:
                raise DataError(f"{later.index.source}: its categories differ from those of {earlier.index.source}")
            if len(common := np.intersect1d(earlier.index.image_ids, later.index.image_ids)):
                raise DataError(f"{later.index.source}: image id {common[0]} is also used by {earlier.index.source}")
