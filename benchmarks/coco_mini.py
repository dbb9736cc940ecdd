"""The COCO recipe on a small set of real photos, from a real ImageNet backbone: scores, and how far each loss fell.

    python benchmarks/coco_mini.py --data DIR --weights FILE --limit 8     over-fit 8 training images and score those
    python benchmarks/coco_mini.py --data DIR --weights FILE               train on all images, score the validation set

DIR is in the official COCO layout (train2017, val2017), FILE a caffe ResNet-50. With `--limit` the exit code is 1 if PQ
stays below 50, or if a loss has not halved between the first and the last tenth of the steps.
"""

import argparse
import json
import platform
import sys
import time
from datetime import date
from pathlib import Path

import torch

from upsnet import commands
from upsnet.config import load_recipe, paths
from upsnet.evaluation.tables import summary_tables, text_table

WANTED_PQ = 50.0


def overrides(options: argparse.Namespace) -> list[str]:
    """What differs from the recipe: a small machine, few images, few steps."""
    return [
        f"dataset.dataset_path={options.data}",
        f"dataset.limit={options.limit or 'null'}",
        f"dataset.test_image_set={'train2017' if options.limit else 'val2017'}",
        "dataset.num_workers=1",
        f"network.pretrained={options.weights}",
        "network.pretrained_convention=caffe",
        "network.pixel_means=[103.939,116.779,123.68]",  # those of this backbone
        f"output_path={options.output}",
        "train.optimizer=adamw",
        "train.lr_schedule=poly",
        f"train.lr={options.lr}",
        f"train.max_iteration={options.iterations}",
        f"train.warmup_iteration={options.iterations // 10}",
        "train.decay_iteration=[]",
        "train.total_batch=2",
        "train.batch_size=2",
        "train.batch_rois=128",
        f"train.scales=[{options.short_side}]",
        f"test.scales=[{options.short_side}]",
        f"train.flip={'false' if options.limit else 'true'}",
        "train.eval_data=false",
        "train.display_iter=10",
        "train.snapshot_step=100000",
    ]


def falls(metrics_file: Path) -> dict[str, tuple[float, float]]:
    """Mean of each loss over the first and over the last tenth of the log's lines."""
    lines = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    tenth = max(len(lines) // 10, 1)

    def mean(name: str, part: list[dict[str, float]]) -> float:
        return sum(line[name] for line in part) / len(part)

    names = [name for name in lines[0] if name.endswith("_loss")]
    return {name: (mean(name, lines[:tenth]), mean(name, lines[-tenth:])) for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--weights", required=True, type=Path)
    parser.add_argument("--limit", type=int, help="over-fit the first N training images")
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--short_side", type=int, default=320)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--output", default="output/benchmarks/coco_mini")
    options = parser.parse_args()

    recipe = load_recipe("upsnet_resnet50_coco_16gpu", overrides(options))
    began = time.monotonic()
    weights = commands.train(recipe)
    minutes = (time.monotonic() - began) / 60
    summary = commands.test(recipe, weights)

    fell = falls(paths.training_folder(recipe) / "metrics.jsonl")
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(f"{date.today()}, torch {torch.__version__}, Python {platform.python_version()}, {machine}, fp32")
    print(f"{options.iterations} steps of 2 images in {minutes:.0f} minutes\n")
    print(summary_tables(summary))
    rows = [[name, f"{first:.4f}", f"{last:.4f}", f"{last / first:.2f}"] for name, (first, last) in fell.items()]
    print(text_table(["loss", "first tenth", "last tenth", "ratio"], rows))
    if not options.limit:
        return 0
    good = summary["panoptic"]["all"]["pq"] >= WANTED_PQ and all(last <= first / 2 for first, last in fell.values())
    print("over-fitted" if good else "not over-fitted")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
