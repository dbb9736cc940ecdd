"""Time and memory of AP at COCO's size: ours class by class, and pycocotools on everything at once.

    python benchmarks/average_precision.py [--images 5000] [--detections 100]

Images, instances (about 7 an image, as polygons) and detections are random. Each way runs in a process of its own;
"peak" is what it needs at most, above what it had before. The exit code is 1 if two ways differ by more than 1e-12.
"""

import argparse
import contextlib
import io
import platform
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from upsnet.evaluation.detection_files import DETECTION_KINDS, detection_file
from upsnet.evaluation.instance_ap import NUMBERS, InstanceAP
from upsnet.evaluation.json_files import JsonListWriter
from upsnet.evaluation.tables import text_table
from upsnet.structures.categories import Categories, Category
from upsnet.structures.results import Detections, Prediction, Truth

HEIGHT, WIDTH, CLASSES = 480, 640, 80
WAYS = ("pycocotools, at once", "ours, pycocotools", "ours, faster-coco-eval")


def blob(draws: np.random.Generator, near: dict[str, Any] | None = None) -> dict[str, Any]:
    """A round polygon anywhere, or a shifted copy of another; with box and area."""
    if near is None:
        corner, size = draws.uniform(0, (WIDTH - 8, HEIGHT - 8)), np.exp(draws.uniform(2, 5.5, 2))
        category_id = int(draws.integers(1, CLASSES + 1))
    else:
        corner = np.asarray(near["bbox"][:2]) + draws.normal(0, 4, 2)
        size, category_id = np.asarray(near["bbox"][2:]) * np.exp(draws.normal(0, 0.1, 2)), near["category_id"]
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    radius = 0.5 + 0.05 * draws.normal(size=24)
    corners = corner + size * (0.5 + np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1))
    corners = corners.clip(0, (WIDTH - 1, HEIGHT - 1))
    low, sides = corners.min(axis=0), np.maximum(np.ptp(corners, axis=0), 1)
    return {
        "category_id": category_id,
        "bbox": [*low.tolist(), *sides.tolist()],
        "area": float(sides.prod() * 0.785),
        "segmentation": [corners.ravel().tolist()],
        "iscrowd": 0,
    }


def truths_of(image_id: int) -> list[dict[str, Any]]:
    """The true instances of an image, the same at every call."""
    draws = np.random.default_rng((1, image_id))
    return [{**blob(draws), "image_id": image_id} for _ in range(draws.poisson(7.3))]


def write_detections(folder: Path, images: int, detections: int) -> None:
    """Two near each true instance, the others anywhere."""
    writers = {kind: JsonListWriter(detection_file(folder, kind)) for kind in DETECTION_KINDS}
    for image_id in tqdm(range(1, images + 1), "detections", unit="image"):
        draws = np.random.default_rng((2, image_id))
        near = [*truths_of(image_id) * 2, *[None] * detections][:detections]
        blobs = [blob(draws, each) for each in near]
        rles = coco_mask.frPyObjects([each["segmentation"][0] for each in blobs], HEIGHT, WIDTH)
        for each, rle in zip(blobs, rles, strict=True):
            record = {"image_id": image_id, "category_id": each["category_id"], "score": float(draws.uniform(0.05, 1))}
            text = {"size": rle["size"], "counts": rle["counts"].decode()}
            writers["bbox"].write({**record, "bbox": each["bbox"]})
            writers["segm"].write({**record, "segmentation": text})
    for writer in writers.values():
        writer.close()


def score(way: str, folder: Path, images: int, kind: str) -> tuple[dict[str, Any], float, float]:
    """The scores of one way, its seconds of processor time and its peak in MiB."""
    if way == "ours, pycocotools":
        sys.modules["faster_coco_eval"] = None  # type: ignore[assignment]
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        scores = at_once(folder, images, kind) if way == WAYS[0] else ours(folder, images, kind)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return scores, time.process_time() - start, peak / 1024


def at_once(folder: Path, images: int, kind: str) -> dict[str, Any]:
    """As pycocotools' demonstration goes."""
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in range(1, images + 1)],
        "annotations": [each for i in range(1, images + 1) for each in truths_of(i)],
        "categories": [{"id": i} for i in range(1, CLASSES + 1)],
    }
    for number, each in enumerate(truth.dataset["annotations"], 1):
        each["id"] = number
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(str(detection_file(folder, kind))), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return {name: 100.0 * value for name, value in zip(NUMBERS, evaluation.stats.tolist(), strict=True)}


def ours(folder: Path, images: int, kind: str) -> dict[str, Any]:
    """The evaluator of `upsnet test`."""
    things = [Category(i, str(i), True, (0, 0, 0)) for i in range(1, CLASSES + 1)]
    evaluator = InstanceAP(
        Categories([*things, Category(999, "stuff", False, (0, 0, 0))]), detection_file(folder, kind), kind
    )
    ids = np.zeros((HEIGHT, WIDTH), np.int32)
    nothing = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32), [])
    for i in range(1, images + 1):
        evaluator.add(Prediction(i, "", instances=nothing), Truth(i, "", ids, [], ids.astype(np.int16), truths_of(i)))
    return evaluator.summary()


def main() -> int:
    """Runs every way on both kinds and prints one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100, help="for each image")
    options = parser.parse_args()
    ways = WAYS if find_spec("faster_coco_eval") else WAYS[:2]
    rows, equal = [], True
    with tempfile.TemporaryDirectory() as folder:
        write_detections(Path(folder), options.images, options.detections)
        for kind in DETECTION_KINDS:
            first = None
            for way in ways:
                with ProcessPoolExecutor(1, get_context("spawn")) as process:
                    scores, seconds, peak = process.submit(score, way, Path(folder), options.images, kind).result()
                first = first or scores
                equal &= all(abs(scores[name] - first[name]) < 1e-12 for name in NUMBERS)
                rows.append([kind, way, f"{seconds:.0f} s", f"{peak:.0f} MiB", f"{scores['ap']!r}"])
    print(f"{date.today()}, {platform.processor() or platform.machine()}, {options.images} images")
    print(text_table(["kind", "way", "processor time", "peak", "AP"], rows, left=2))
    print("all numbers equal to 1e-12" if equal else "NUMBERS DIFFER")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
