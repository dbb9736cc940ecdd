"""Our panoptic quality against the official rule in numpy: `python benchmarks/panoptic_quality.py [--out table.md]`.

In memory, in one process, on one core. The contestants take turns, so that a load on the machine meets all of them; the
figures are medians after a warm-up. The ratio is the official rule's time over ours. For scale, the time that it takes
to read both maps once.
"""

import datetime
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.operators import medians, processor, run
from upsnet.evaluation.panoptic_quality import Overlaps, match_segments
from upsnet.operators import library
from upsnet.structures.categories import Categories, Category
from upsnet.structures.results import Prediction, Segment, Truth

SIZES = ((480, 640, 15), (1024, 2048, 40))
"""Height, width, segments."""
NUM_STUFF, NUM_THINGS = 53, 80
VOID_ID, BASE = 0, 1 << 24

CATEGORIES = Categories([Category(i + 1, str(i), i >= NUM_STUFF, (0, 0, 0)) for i in range(NUM_STUFF + NUM_THINGS)])


def scene(height: int, width: int, count: int, seed: int, moved: float) -> tuple[NDArray[np.int32], list[Segment]]:
    """A third of the segments are bands with wavy edges (stuff), the rest are dented ellipses (things); with void.

    moved: by how much of its size a thing is moved and grown, for a prediction that resembles the truth.
    """
    draws, shifts = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    y, x = np.mgrid[:height, :width]
    ids = (draws.choice(BASE - 1, count, replace=False) + 1).astype(np.int32)
    label_map = np.zeros((height, width), np.int32)
    bands = count // 3
    for i in range(bands):
        label_map[y > height * i / bands + height / 30 * np.sin(x / width * 9 + i + moved)] = ids[i]
    for i in range(bands, count):
        center, radius = draws.uniform(0, [height, width]), draws.uniform(0.05, 0.2, 2) * height
        center, radius = center + moved * shifts.normal(size=2) * radius, radius * (1 + moved * shifts.normal())
        dents = 0.2 * np.sin(x / 7 + moved) * np.sin(y / 5)
        label_map[((y - center[0]) / radius[0]) ** 2 + ((x - center[1]) / radius[1]) ** 2 + dents < 1] = ids[i]
    label_map[:, : width // 40] = VOID_ID
    classes = {int(ids[i]): i % NUM_STUFF if i < bands else NUM_STUFF + i % 7 for i in range(count)}
    present = [int(i) for i in np.unique(label_map) if i]
    return label_map, [Segment(i, classes[i], int((label_map == i).sum()), (0, 0, 0, 0)) for i in present]


# -- the official rule, with two passes of np.unique -------------------------------------------------------------------


def official_count(truth_map: NDArray[np.int32], prediction_map: NDArray[np.int32]) -> tuple[dict, dict]:
    """Areas of the predictions, and pixels of the pairs of ids."""
    area = dict(zip(*(column.tolist() for column in np.unique(prediction_map, return_counts=True)), strict=True))
    pairs = truth_map.astype(np.uint64) * np.uint64(BASE) + prediction_map.astype(np.uint64)
    keys, counts = np.unique(pairs, return_counts=True)
    return area, {divmod(key, BASE): n for key, n in zip(keys.tolist(), counts.tolist(), strict=True)}


def official_match(truth: Truth, prediction: Prediction) -> list[tuple[int, float]]:
    """(class, IoU) of the true positives; then false negatives and false positives are found as well."""
    assert prediction.segment_map is not None
    area, shared = official_count(truth.segment_map, prediction.segment_map)
    wanted, given = {s.id: s for s in truth.segments}, {s.id: s for s in prediction.segments}
    matches, found, used = [], set(), set()
    for (truth_id, prediction_id), pixels in shared.items():
        if truth_id not in wanted or prediction_id not in given:
            continue
        if wanted[truth_id].is_crowd or wanted[truth_id].semantic_id != given[prediction_id].semantic_id:
            continue
        union = wanted[truth_id].area + area[prediction_id] - pixels - shared.get((VOID_ID, prediction_id), 0)
        if pixels / union > 0.5:
            matches.append((wanted[truth_id].semantic_id, pixels / union))
            found.add(truth_id)
            used.add(prediction_id)
    missed = [i for i, s in wanted.items() if i not in found and not s.is_crowd]
    invented = [i for i in given if i not in used and 2 * shared.get((VOID_ID, i), 0) <= area[i]]
    assert len(matches) + len(missed) <= len(wanted) and len(matches) + len(invented) <= len(given)
    return matches


# -- the table ---------------------------------------------------------------------------------------------------------


def without_native(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same call with numpy's counting."""

    def run(*arguments: Any) -> Any:
        with mock.patch.object(library, "count_overlaps", None):
            return call(*arguments)

    return run


def rows_of(height: int, width: int, count: int, rounds: int) -> list[str]:
    (truth_map, truth_segments), (prediction_map, segments) = (
        scene(height, width, count, 0, moved) for moved in (0.0, 0.1)
    )
    truth = Truth(1, "", truth_map, truth_segments, np.zeros(truth_map.shape, np.int16))
    prediction = Prediction(1, "", prediction_map, segments)
    ours = match_segments(prediction, truth, CATEGORIES)
    matches = sorted((m.truth.semantic_id, m.iou) for m in ours.matched)
    assert matches == sorted(official_match(truth, prediction))

    def counts(function: Callable[..., object]) -> Callable[[], object]:
        return lambda: function(truth_map, prediction_map)

    def matching(pair: Any = (prediction, truth, CATEGORIES)) -> object:
        return match_segments(*pair)

    def read() -> object:
        return truth_map.max(), prediction_map.max()

    contestants = [
        counts(official_count), counts(Overlaps), counts(without_native(Overlaps)),
        lambda: official_match(truth, prediction), matching, without_native(matching), read,
    ]  # fmt: skip
    *times, reading = medians(contestants, rounds)
    bytes_read = truth_map.nbytes + prediction_map.nbytes
    name = f"{width}×{height}, {len(truth_segments)} segments, {len(ours.overlaps.pixels)} pairs"
    rows = []
    for what, (official, native, plain) in (("counting", times[:3]), ("counting and matching", times[3:])):
        rate = bytes_read / native / 1e6
        rows.append(
            f"| {name}, {what} | {official:.3f} | {native:.3f} | {official / native:.1f} | {plain:.3f} | "
            f"{official / plain:.1f} | {rate:.1f} | {reading:.3f} ms, {bytes_read / reading / 1e6:.1f} |"
        )
    return rows


def table(rounds: int) -> str:
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    lines = [
        "# Panoptic quality in memory, against the official rule in numpy",
        "",
        f"{datetime.date.today()}, {processor()}, one core (load of the machine {load}), numpy {np.__version__}, "
        f"Python {platform.python_version()}.",
        f"{library.describe_counting()}.",
        f"Milliseconds, medians of {rounds} rounds, contestants taking turns in one process. Official: two passes of",
        "`np.unique`, areas and pairs as dictionaries; ratio = official / ours. GB/s: bytes of both int32 maps by the",
        "native time. Limit: `max()` of both maps, which reads them once.",
        "",
        "| case | official | native | ratio | numpy fallback | ratio | native GB/s | limit, GB/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in SIZES:
        lines += rows_of(*size, rounds)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if library.count_overlaps is None:
        sys.exit(f"{library.describe_counting()}: build it first")
    run(__doc__, table, rounds=51)
