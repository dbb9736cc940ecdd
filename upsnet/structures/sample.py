"""What travels from the data set to the network: one photo (`Sample`), several (`Batch`).

Boxes are (x1, y1, x2, y2) in inclusive pixels: width = x2 - x1 + 1. Instances stay in the coordinates of the original
photo; images and maps are at network scale (photo × `scale`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from upsnet.structures.draws import Draws
from upsnet.structures.masks import Masks
from upsnet.structures.transfer import upload

VOID = -1
"""Label of pixels without a class in every semantic map; losses and scores leave them out."""


@dataclass(slots=True)
class Instances:
    """The ground-truth things of one photo, in original pixels. They stay on the host, see `Batch.to`.

    boxes: N×4 float32. classes: N int64, 1..C-1. is_crowd: N bool. masks: N masks.
    """

    boxes: Tensor
    classes: Tensor
    is_crowd: Tensor
    masks: Masks

    def __len__(self) -> int:
        return len(self.boxes)

    def without_crowd(self) -> "Instances":
        """The instances that are single things, in the same order."""
        places = np.flatnonzero(~self.is_crowd.numpy())
        keep = torch.from_numpy(places)
        return Instances(self.boxes[keep], self.classes[keep], self.is_crowd[keep], self.masks.select(places.tolist()))

    def crowd_boxes(self) -> Tensor:
        """K×4 boxes of the groups of things."""
        return self.boxes[torch.from_numpy(np.flatnonzero(self.is_crowd.numpy()))]


@dataclass(slots=True)
class Targets:
    """What a network is to find in one photo; a part that a data set does not have is None.

    semantic: h×w int16 semantic ids at network scale, VOID where there is none.
    quarter_masks: n×round(h/4)×round(w/4) bool, one plane for each instance that is not a crowd, in their order.
    """

    instances: Instances | None = None
    semantic: Tensor | None = None
    quarter_masks: Tensor | None = None


@dataclass(slots=True)
class Sample:
    """One photo as the network sees it.

    image: 3×h×w float32, BGR minus the channel means (or as the recipe says), without padding.
    original_size: height and width of the photo. scale: network pixels per photo pixel.
    views: the same photo at other scales or mirrored, for a test that fuses them.
    """

    image_id: int
    file_name: str
    image: Tensor
    original_size: tuple[int, int]
    scale: float
    flipped: bool = False
    targets: Targets | None = None
    views: "Sequence[Sample]" = ()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image at network scale, without padding."""
        return int(self.image.shape[-2]), int(self.image.shape[-1])


@dataclass(slots=True)
class Batch:
    """Samples padded with zeros at the right and bottom to one size, a multiple of 32.

    images: B×3×H×W float32. semantic: B×H×W int16 padded with VOID, or None.
    sizes: unpadded (h, w) of each image. draws: for each image its random draws (training only).
    views: the same photos in the same order at another scale or mirrored, each a batch of its own (test only).
    skipped: why photos could not be read in whose places others stand.
    """

    images: Tensor
    sizes: list[tuple[int, int]]
    image_ids: list[int]
    file_names: list[str]
    original_sizes: list[tuple[int, int]]
    scales: list[float]
    flipped: list[bool]
    instances: list[Instances] | None = None
    semantic: Tensor | None = None
    quarter_masks: list[Tensor] | None = None
    draws: Sequence[Draws] = ()
    views: "Sequence[Batch]" = ()
    skipped: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.image_ids)

    def to(self, device: torch.device) -> "Batch":
        """The batch with its maps on the device; the host does not wait for them.

        Instances stay on the host, where their number and places are known without asking.
        """
        return self._each(lambda tensor: upload(tensor, device))

    def pin_memory(self) -> "Batch":
        """The batch with its maps in pinned memory; torch's data loaders call it by this name."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            images=change(self.images),
            semantic=None if self.semantic is None else change(self.semantic),
            quarter_masks=None if self.quarter_masks is None else [change(masks) for masks in self.quarter_masks],
            views=[view._each(change) for view in self.views],
        )
