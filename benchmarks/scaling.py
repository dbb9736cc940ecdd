"""A plan past this machine: `python benchmarks/scaling.py [--measured FILE.json] [--out docs/scaling.md]`.

From the gradients' bytes, the compute time of one GPU and the figures of a network it works out steps, efficiency and
cost of training on many GPUs, what the data and the evaluation want, and holds its own rule against what
`benchmarks/throughput.py` measured with one and two workers. `docs/scaling.md` says where the figures come from; of
that page only what follows the line `<!-- tables -->` is replaced.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.operators import parser_of, show
from benchmarks.throughput import PLAIN, SIDE_BY_SIDE, Measured
from upsnet import builders
from upsnet.config import Recipe, load_recipe
from upsnet.structures.class_tables import class_table

RESULTS = Path(__file__).resolve().parent / "results"
RECIPES = {"R50": "upsnet_resnet50_coco_16gpu", "R101-DCN": "upsnet_resnet101_dcn_coco_3x_16gpu"}
GPUS, GPUS_A_NODE = (16, 64, 256), 8
NETWORKS = {"100 Gb": 100e9 / 8, "400 Gb": 400e9 / 8}
"""Bytes a second of one node's network card, each way."""
NVLINK = 150e9
"""Bytes a second of one GPU to the others of its node, each way."""
REACHED = 0.8
"""Share of the line rates that an all-reduce reaches."""
NETWORK_LATENCY, NVLINK_LATENCY = 20e-6, 5e-6
"""Seconds of one message."""
LAST_BUCKET = 25e6
"""Bytes of gradients that are ready only when the backward pass ends: one bucket of DDP."""
BACKWARD = 0.61
"""Share of a step that the backward pass takes: benchmarks/results/training.md."""
R101_WORK = (673 + 144) / 673
"""Work of R101 over that of R50, forward at 800×1216: 673 GFLOP (benchmarks/results/inference.md) and 17 more blocks of
res4, 144 GFLOP. Deformable sampling comes on top."""

PHOTO_BYTES, LABEL_BYTES = 153e3, 4.6e3
"""Mean sizes of a photo and of a panoptic PNG of coco_mini."""
LOADER_SECONDS = 0.0133
"""Processor time of a loader process for one image: benchmarks/results/loading.md."""
VAL_IMAGES, HOST_SECONDS, MERGE_SECONDS, AP_SECONDS = 5000, 0.0149, 0.0016, 52.0
"""COCO's val2017. A worker's processor time to store and measure one image with 100 detections, rank 0's to take it in,
and that of average precision (faster-coco-eval: benchmarks/results/average_precision.md)."""
TEST_SECONDS = 0.015
"""One GPU's time for one image from tensor to panoptic map: what this project asks of itself, not measured."""
MARK = "<!-- tables -->\n"


@dataclass(frozen=True)
class Rate:
    """Training images a second of one GPU on R50, and where the figure comes from."""

    name: str
    images: float


RATES = (Rate("6.6 images/s", 53 / 8), Rate("53 images/s", 53.0))


def ring(gradient_bytes: float, gpus: int, network: float) -> float:
    """Seconds of an all-reduce in one ring through all GPUs, whose slowest links are the nodes' network cards."""
    nodes = -(-gpus // GPUS_A_NODE)
    slowest = network if nodes > 1 else NVLINK
    latency = 2 * nodes * NETWORK_LATENCY * (nodes > 1) + 2 * (gpus - nodes) * NVLINK_LATENCY
    return 2 * gradient_bytes * (gpus - 1) / gpus / (REACHED * slowest) + latency


def hierarchical(gradient_bytes: float, gpus: int, network: float) -> float:
    """Seconds of one in three parts: reduce-scatter in each node, all-reduce of shares between nodes, all-gather."""
    inside = min(gpus, GPUS_A_NODE)
    nodes = -(-gpus // GPUS_A_NODE)
    in_nodes = 2 * gradient_bytes * (inside - 1) / inside / (REACHED * NVLINK) + 2 * (inside - 1) * NVLINK_LATENCY
    # All GPUs of a node send their shares, which are the gradients once, through one card.
    between = 2 * gradient_bytes * (nodes - 1) / nodes / (REACHED * network) + 2 * (nodes - 1) * NETWORK_LATENCY
    return in_nodes + between


def exposed(all_reduce: float, gradient_bytes: float, overlap: float) -> float:
    """Seconds of an all-reduce that the backward pass does not hide. overlap: seconds in which it can be hidden."""
    last = min(LAST_BUCKET / gradient_bytes, 1.0)
    return max(all_reduce * last, all_reduce - overlap)


def slowest_of(workers: int, steps: list[float], draws: int = 20_000) -> float:
    """Expected seconds of the slowest of several workers, each of whose steps is drawn from those measured."""
    chosen = np.random.default_rng(0).choice(steps, (draws // workers + 1, workers))
    return float(chosen.max(axis=1).mean())


def gradient_bytes_of(recipe: Recipe) -> int:
    """Bytes of the trained parameters' gradients in float32."""
    categories = class_table("coco")
    assert categories is not None
    network = builders.build_network(recipe, categories)
    return 4 * sum(p.numel() for p in network.parameters() if p.requires_grad)


def training_rows(measured: Measured) -> list[str]:
    spread = [seconds / float(np.mean(measured.steps[PLAIN])) for seconds in measured.steps[PLAIN]]
    lines = [
        "| network, gradients | one GPU, R50 | GPUs | between nodes | ring, ms | hierarchical, ms | compute, ms "
        "| slowest, ms | exposed, ms | efficiency | images/s | hours | GPU-hours |",
        "|" + "---|" * 13,
    ]
    for name, recipe_name in RECIPES.items():
        recipe = load_recipe(recipe_name, ())
        gradient_bytes = gradient_bytes_of(recipe)
        images = recipe.train.max_iteration * (recipe.train.total_batch or 1)
        for rate in RATES:
            compute = (1.0 if name == "R50" else R101_WORK) / rate.images
            for gpus in GPUS:
                for network, speed in NETWORKS.items():
                    around, through = ring(gradient_bytes, gpus, speed), hierarchical(gradient_bytes, gpus, speed)
                    waits = compute * slowest_of(gpus, spread)
                    open_part = exposed(min(around, through), gradient_bytes, BACKWARD * compute)
                    step = waits + open_part
                    hours = images / gpus * step / 3600
                    lines.append(
                        f"| {name}, {gradient_bytes / 1e6:.0f} MB | {rate.name} | {gpus} | {network} "
                        f"| {1e3 * around:.1f} | {1e3 * through:.1f} | {1e3 * compute:.0f} | {1e3 * waits:.0f} "
                        f"| {1e3 * open_part:.1f} | {compute / step:.0%} | {gpus / step:.0f} | {hours:.2g} "
                        f"| {gpus * hours:.0f} |"
                    )
    return lines


def data_rows() -> list[str]:
    lines = ["| images/s | data, MB/s | loader cores |", "|---|---|---|"]
    for rate in sorted({gpus * rate.images for gpus in GPUS for rate in RATES}):
        lines.append(
            f"| {rate:.0f} | {rate * (PHOTO_BYTES + LABEL_BYTES) / 1e6:.0f} | {math.ceil(rate * LOADER_SECONDS)} |"
        )
    return lines


def evaluation_rows() -> list[str]:
    """A test's images are shared out; taking the records in and average precision are rank 0's alone."""
    alone = VAL_IMAGES * MERGE_SECONDS + AP_SECONDS
    lines = ["| workers | images, s | rank 0 alone, s | together, s |", "|---|---|---|---|"]
    for workers in (1, GPUS_A_NODE, *GPUS):
        shared = VAL_IMAGES / workers * (TEST_SECONDS + HOST_SECONDS)
        own = alone if workers > 1 else AP_SECONDS
        lines.append(f"| {workers} | {shared:.1f} | {own:.0f} | {shared + own:.0f} |")
    return lines


def check_rows(measured: Measured) -> list[str]:
    """The rule that the tables stand on against what was measured here."""
    lines = [
        "| started by | step predicted, ms | measured, ms | deviation | gain predicted | measured |",
        "|---|---|---|---|---|---|",
    ]
    # One core computes and sends: nothing of the all-reduce is hidden.
    waits = slowest_of(2, measured.steps[SIDE_BY_SIDE])
    predicted = waits + exposed(measured.all_reduce, measured.gradient_bytes, overlap=0.0)
    for way in measured.steps:
        if way in (PLAIN, SIDE_BY_SIDE):
            continue
        seconds = measured.seconds(way)
        lines.append(
            f"| {way} | {1e3 * predicted:.0f} | {1e3 * seconds:.0f} | {predicted / seconds - 1:+.1%} | "
            f"{2 * measured.seconds(PLAIN) / predicted:.2f} × | {measured.gain(way):.2f} × |"
        )
    return lines


def table(measured: Measured) -> str:
    parts = [
        ("Training", training_rows(measured)),
        ("Data", data_rows()),
        (f"Evaluation of {VAL_IMAGES} images", evaluation_rows()),
        ("Prediction against measurement: one worker to two, shapes recipe, two pinned cores", check_rows(measured)),
    ]
    return "\n" + "\n".join(f"## {title}\n\n" + "\n".join(lines) + "\n" for title, lines in parts)


def main() -> None:
    parser = parser_of(__doc__ or "", rounds=1, devices=())
    parser.add_argument(
        "--measured", type=Path, default=RESULTS / "throughput.json", help="what benchmarks/throughput.py has written"
    )
    options = parser.parse_args()
    if not options.measured.is_file():
        sys.exit(f"{options.measured}: there is no such file: run benchmarks/throughput.py --out TABLE.md first")
    page = options.out.read_text() if options.out and options.out.is_file() else ""
    head = page[: page.index(MARK) + len(MARK)] if MARK in page else ""
    show(head + table(Measured(**json.loads(options.measured.read_text()))), options.out)


if __name__ == "__main__":
    main()
