"""How fast training samples are made, stage by stage: `python benchmarks/loading.py [--data DIR] [--out table.md]`.

DIR is in the official COCO layout (train2017, val2017) and read as the COCO recipe reads it; `shapes` is generated.
Stages are timed inside the data set's own calls, in one process with one thread, as in a loader process; what is left
is "other". Figures are medians over the images of processor time, files in the page cache; the rate is by the clock.
"""

import argparse
import datetime
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.operators import positive, processor, show
from upsnet import builders
from upsnet.config import Recipe, load_recipe
from upsnet.dataset import coco_panoptic
from upsnet.dataset.annotated_set import AnnotatedSet, Labels
from upsnet.dataset.batches import Draw, collate
from upsnet.dataset.photo_set import PhotoSet
from upsnet.dataset.shapes import write_shapes
from upsnet.dataset.transforms import Transform

# stage, what is patched, in the order of a sample's making; none contains another
STAGES: tuple[tuple[str, Any, str], ...] = (
    ("photo: read, decode", PhotoSet, "photo"),
    ("photo: normalise, resize", Transform, "image"),
    ("label: read, decode, check", AnnotatedSet, "labels"),
    ("semantic map: paint", Labels, "semantic_map"),
    ("semantic map: resize", coco_panoptic, "resize_labels"),
    ("boxes and masks", AnnotatedSet, "instances"),
    ("quarter masks", coco_panoptic, "quarter_masks"),
)
Times = dict[str, list[float]]


def timed(call: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    """The call, which appends its milliseconds of processor time to `times`."""

    def measure(*arguments: Any, **options: Any) -> Any:
        start = time.thread_time()
        result = call(*arguments, **options)
        times.append(1e3 * (time.thread_time() - start))
        return result

    return measure


@contextmanager
def stages_timed() -> Iterator[Times]:
    """Milliseconds of every call, by stage."""
    times: Times = {name: [] for name, _, _ in STAGES}
    with ExitStack() as patches:
        for name, owner, attribute in STAGES:
            patches.enter_context(patch.object(owner, attribute, timed(getattr(owner, attribute), times[name])))
        yield times


def milliseconds(recipe: Recipe, images: int) -> dict[str, float]:
    """Median milliseconds of processor time of every stage for an image, in this process."""
    dataset = builders.build_training_set(recipe)
    entries = np.random.default_rng(0).permutation(len(dataset))[:images].tolist()
    for entry in entries:
        dataset[Draw(entry, 0)]  # the files come into the page cache
    with stages_timed() as times:
        times["sample"], times["collate"] = [], []
        make, put_together = timed(dataset.__getitem__, times["sample"]), timed(collate, times["collate"])
        for entry in tqdm(entries, desc=recipe.dataset.dataset, unit="image"):
            put_together([make(Draw(entry, 0))])
    within = [sum(stages) for stages in zip(*(times[name] for name, _, _ in STAGES), strict=True)]
    times["other"] = [whole - part for whole, part in zip(times.pop("sample"), within, strict=True)]
    return {name: statistics.median(of_stage) for name, of_stage in times.items()}


def loader_rate(recipe: Recipe) -> float:
    """Images a second that arrive from one loader process, after the first batch."""
    loader = builders.build_training_loader(recipe, builders.build_training_set(recipe), 0)
    arrivals = []
    for _ in tqdm(loader, desc="one loader process", unit="batch"):
        arrivals.append(time.perf_counter())
    return (len(arrivals) - 1) * recipe.train.batch_size / (arrivals[-1] - arrivals[0])


def recipes(data: Path | None, images: int, scratch: Path) -> Iterator[tuple[str, Recipe]]:
    """The cases: name, and the recipe of which a loader gives `images` images, one at a time."""
    common = [f"train.max_iteration={images}", "train.batch_size=1", "train.total_batch=1", "train.decay_iteration=[]"]
    common += ["train.warmup_iteration=0", "dataset.num_workers=1"]
    if data is not None:
        for image_set in ("train2017", "val2017"):
            where = [f"dataset.dataset_path={data}", f"dataset.image_set={image_set}"]
            yield f"{data.name}, {image_set}", load_recipe("upsnet_resnet50_coco_16gpu", [*where, *common])
    write_shapes(scratch, images, 1, seed=0)
    yield "shapes", load_recipe("upsnet_resnet18_shapes", [f"dataset.dataset_path={scratch}", *common])


def table(data: Path | None, images: int) -> str:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    columns: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, recipe in recipes(data, images, Path(scratch)):
            stages = milliseconds(recipe, images)
            columns[name] = {**stages, "sum": sum(stages.values()), "images/s, one loader process": loader_rate(recipe)}
    names = list(next(iter(columns.values())))
    lines = [
        "# Making training samples",
        "",
        f"{datetime.date.today()}, {processor()}, one thread (load of the machine "
        f"{', '.join(f'{load:.1f}' for load in os.getloadavg())}), torch {torch.__version__}, "
        f"OpenCV {cv2.__version__}, Python {platform.python_version()}.",
        f"Milliseconds of processor time an image, medians of {images} images; short side 800 (shapes: 192).",
        "",
        f"| stage | {' | '.join(columns)} |",
        "|---|" + "---|" * len(columns),
    ]
    for name in names:
        values = " | ".join(f"{column[name]:.2f}" for column in columns.values())
        lines.append(f"| {name} | {values} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--images", type=positive, default=100)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    show(table(options.data, options.images), options.out)


if __name__ == "__main__":
    main()
