"""Our operators against torchvision's, in one process: `python benchmarks/operators.py [--out table.md] [--rounds 7]`.

The contestants take turns (ours, torchvision, ours, …), so that a load on the machine meets all of them; the figures
are medians. The ratio is torchvision's time over ours. For scale, the plain convolution of equal size.
"""

import argparse
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torchvision
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from upsnet.operators import deform_conv2d, describe, nms

# images, channels, outputs, height, width
DEFORM_CASES = [
    (1, 256, 256, 200, 304),
    (1, 256, 256, 100, 152),
    (1, 256, 128, 100, 152),
    (1, 256, 256, 25, 38),
    (8, 128, 128, 48, 64),
    (8, 64, 64, 48, 64),
    (8, 64, 64, 24, 32),
    (8, 64, 64, 12, 16),
    (8, 64, 64, 6, 8),
]
NMS_CASES = [(1000, 0.5), (2000, 0.7), (6000, 0.5), (6000, 0.7), (12000, 0.7)]
Row = tuple[str, float, float, float | None]


def medians(contestants: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median milliseconds of each, taking turns, after one warm-up."""
    times: list[list[float]] = [[] for _ in contestants]
    for turn in range(rounds + 1):
        for call, record in zip(contestants, times, strict=True):
            start = time.perf_counter()
            call()
            if turn:
                record.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(record) for record in times]


def deform_rows(case: tuple[int, ...], memory_format: torch.memory_format, rounds: int) -> Iterator[Row]:
    images, channels, outputs, height, width = case
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(images, channels, height, width, generator=draw).contiguous(memory_format=memory_format)
    offset = torch.randn(images, 18, height, width, generator=draw) * 2
    weight = torch.randn(outputs, channels, 3, 3, generator=draw)
    leaves = [tensor.requires_grad_() for tensor in (x, offset, weight)]
    upstream = torch.randn(images, outputs, height, width, generator=draw).contiguous(memory_format=memory_format)
    calls = [
        lambda: deform_conv2d(x, offset, weight, padding=1),
        lambda: torchvision.ops.deform_conv2d(x, offset, weight, padding=1),
        lambda: torch.nn.functional.conv2d(x, weight, padding=1),
    ]

    def and_backward(call: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(), leaves, upstream, allow_unused=True)

    layout = "channels-last" if memory_format == torch.channels_last else "contiguous"
    name = f"deform_conv2d {images}×{channels}→{outputs}, {height}×{width}, {layout}"
    with torch.no_grad():
        yield (f"{name}, forward", *medians(calls, rounds))
    yield (f"{name}, forward + backward", *medians([and_backward(call) for call in calls], max(3, rounds // 2)))


def nms_row(count: int, threshold: float, clustered: bool, rounds: int) -> Row:
    draw = torch.Generator().manual_seed(0)
    centre = torch.rand(count, 2, generator=draw) * torch.tensor([1216.0, 800.0])
    if clustered:  # around 60 objects, as a region proposal network gives them
        centre = centre[torch.arange(count) % 60] + torch.randn(count, 2, generator=draw) * 12
    side = torch.exp(torch.randn(count, 2, generator=draw) * 0.5 + 4)
    boxes, scores = torch.cat([centre - side / 2, centre + side / 2], 1), torch.rand(count, generator=draw)
    calls = [lambda: nms(boxes, scores, threshold), lambda: torchvision.ops.nms(boxes, scores, threshold)]
    kind = "clustered" if clustered else "uniform"
    ours, theirs = medians(calls, rounds)
    return f"nms {count} boxes, {kind}, threshold {threshold} ({len(calls[0]())} kept)", ours, theirs, None


def all_rows(rounds: int) -> Iterator[Row]:
    for case in DEFORM_CASES:
        for memory_format in (torch.channels_last, torch.contiguous_format):
            yield from deform_rows(case, memory_format, rounds)
    for count, threshold in NMS_CASES:
        for clustered in (False, True):
            yield nms_row(count, threshold, clustered, rounds)


def processor() -> str:
    """Model name and the widest instructions that torch sees."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def table(rounds: int) -> str:
    lines = [
        "# Operators on the CPU, against torchvision",
        "",
        f"{datetime.date.today()}, {processor()}, {torch.get_num_threads()} threads, float32, "
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, Python {platform.python_version()}.",
        f"{describe()}.",
        f"Milliseconds, medians of {rounds} rounds (half for backward), contestants taking turns in one process;",
        "ratio = torchvision / ours. Plain = `conv2d` of equal size. Offsets are normal with deviation 2.",
        "",
        "| case | ours | torchvision | ratio | plain |",
        "|---|---|---|---|---|",
    ]
    for name, ours, theirs, plain in tqdm(all_rows(rounds), total=4 * len(DEFORM_CASES) + 2 * len(NMS_CASES)):
        last = "" if plain is None else f"{plain:.2f}"
        lines.append(f"| {name} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.1f} | {last} |")
    return "\n".join(lines) + "\n"


def run(description: str, table: Callable[[int], str], rounds: int) -> None:
    """The command line of a benchmark: prints its table, which takes the number of rounds, and writes it with --out."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--rounds", type=int, default=rounds)
    options = parser.parse_args()
    text = table(options.rounds)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


if __name__ == "__main__":
    run(__doc__, table, rounds=7)
