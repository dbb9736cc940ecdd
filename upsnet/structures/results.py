"""What comes out of a network for one photo (`Prediction`) and what an evaluator holds against it (`Truth`).

All maps have the photo's own size; classes are semantic ids of the class table (`Categories`).
"""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from upsnet.structures.segment_runs import SegmentRuns

Output = Literal["panoptic", "instances", "semantic"]
OUTPUTS: frozenset[Output] = frozenset(get_args(Output))
"""The parts of a `Prediction` that can be asked for: the panoptic map and its segments, the detections of the instance
head, the map of the semantic head."""


@dataclass(slots=True)
class TrainingOutput:
    """What a network returns in training mode: scalar tensors by name.

    losses: unweighted, each the mean over the batch's images, with gradient. metrics: for the log only, detached.
    """

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class Segment:
    """One segment of a panoptic map.

    area: pixels. bbox: x, y, width, height in pixels (COCO). score: 0..1 for things, None for stuff and truth.
    is_crowd: a group of things (truth only).
    """

    id: int
    semantic_id: int
    area: int
    bbox: tuple[int, int, int, int]
    score: float | None = None
    is_crowd: bool = False


@dataclass(slots=True)
class Detections:
    """Instances found by the instance head, strongest last or first in no promised order.

    boxes: N×4 float32 (x1, y1, x2, y2) inclusive photo pixels. classes: N int64 thing classes 1..C-1.
    scores: N float32 in 0..1. masks: N COCO RLE dictionaries of the photo's size.
    """

    boxes: NDArray[np.float32]
    classes: NDArray[np.int64]
    scores: NDArray[np.float32]
    masks: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.boxes)


@dataclass(slots=True)
class Prediction:
    """A network's answer for one photo; a part that was not asked for, or that a network does not give, is None.

    segment_map: H×W int32, ids of `segments`, 0 = no label. semantic_map: H×W int16 semantic ids.
    """

    image_id: int
    file_name: str
    segment_map: NDArray[np.int32] | None = None
    segments: list[Segment] = field(default_factory=list)
    instances: Detections | None = None
    semantic_map: NDArray[np.int16] | None = None


@dataclass(slots=True)
class Truth:
    """The labels of one photo, unscaled and unflipped.

    segment_map: H×W int32 ids as in the panoptic PNG, 0 = void. semantic_map: H×W int16, VOID where there is no label.
    annotations: COCO instance annotations (`id`, `category_id`, `bbox`, `area`, `iscrowd`, `segmentation`) for AP:
    those of the instances json, or made from the panoptic PNG where there is none.
    """

    image_id: int
    file_name: str
    segment_map: NDArray[np.int32]
    segments: list[Segment]
    semantic_map: NDArray[np.int16]
    annotations: list[dict[str, Any]] = field(default_factory=list)


def segments_of(
    segment_map: NDArray[np.int32], semantic_ids: dict[int, int], scores: dict[int, float] | None = None
) -> list[Segment]:
    """Segments with area and box of every id in the map, ascending; 0 is left out.

    Args:
        segment_map: H×W segment ids.
        semantic_ids: semantic id of every segment id that occurs.
        scores: score of those segments that have one.
    """
    scores = scores or {}
    runs = SegmentRuns.of(segment_map)
    return [
        Segment(segment_id, semantic_ids[segment_id], area, (x, y, w, h), scores.get(segment_id))
        for segment_id, area, (x, y, w, h) in zip(
            runs.ids.tolist(), runs.areas.tolist(), runs.boxes.tolist(), strict=True
        )
        if segment_id != 0
    ]
