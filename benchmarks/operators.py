"""Our operators against torchvision's, in one process: `python benchmarks/operators.py [--out table.md] [--rounds 7]`.

The contestants take turns (ours, torchvision, ours, …), so that a load on the machine meets all of them; the figures
are medians. The ratio is torchvision's time over ours. For scale, the plain convolution of equal size. With
`--device cuda` every call is waited for.
"""

import argparse
import contextlib
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


def medians(contestants: list[Callable[[], object]], rounds: int, device: str = "cpu") -> list[float]:
    """Median milliseconds of each, taking turns, after one warm-up; on `cuda` until its work is done."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: list[list[float]] = [[] for _ in contestants]
    for turn in range(rounds + 1):
        for call, record in zip(contestants, times, strict=True):
            wait()
            start = time.perf_counter()
            call()
            wait()
            if turn:
                record.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(record) for record in times]


def torchvisions_deform_conv2d(dtype: torch.dtype, device: str) -> tuple[Callable[..., torch.Tensor], str]:
    """torchvision's operator for tensors of a dtype, and a word: in float32 with casts, as autocast does it, where it
    lacks that dtype."""
    operator = torchvision.ops.deform_conv2d
    try:
        operator(
            *(torch.zeros(shape, dtype=dtype, device=device) for shape in ((1, 1, 1, 1), (1, 2, 1, 1), (1, 1, 1, 1)))
        )
    except RuntimeError:
        return lambda x, offset, weight, padding: operator(
            x.float(), offset.float(), weight.float(), padding=padding
        ).to(dtype), ", torchvision casts to float32"
    return lambda x, offset, weight, padding: operator(x, offset.to(dtype), weight, padding=padding), ""


def deform_rows(
    case: tuple[int, ...],
    memory_format: torch.memory_format,
    rounds: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[Row]:
    images, channels, outputs, height, width = case
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(images, channels, height, width, generator=draw).contiguous(memory_format=memory_format)
    offset = (torch.randn(images, 18, height, width, generator=draw) * 2).to(device)
    weight = torch.randn(outputs, channels, 3, 3, generator=draw)
    upstream = torch.randn(images, outputs, height, width, generator=draw).contiguous(memory_format=memory_format)
    x, weight, upstream = (tensor.to(device, dtype) for tensor in (x, weight, upstream))
    leaves = [tensor.requires_grad_() for tensor in (x, offset, weight)]
    theirs, note = torchvisions_deform_conv2d(dtype, device)
    calls = [
        lambda: deform_conv2d(x, offset, weight, padding=1),
        lambda: theirs(x, offset, weight, padding=1),
        lambda: torch.nn.functional.conv2d(x, weight, padding=1),
    ]

    def and_backward(call: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(), leaves, upstream, allow_unused=True)

    layout = "channels-last" if memory_format == torch.channels_last else "contiguous"
    name = f"deform_conv2d {images}×{channels}→{outputs}, {height}×{width}, {layout}, {str(dtype)[6:]}{note}"
    with torch.no_grad():
        yield (f"{name}, forward", *medians(calls, rounds, device))
    backwards = [and_backward(call) for call in calls]
    yield (f"{name}, forward + backward", *medians(backwards, max(3, rounds // 2), device))


@contextlib.contextmanager
def products_in(precision: str) -> Iterator[None]:
    """float32 products on the GPU: `ieee`, or `tf32` for matrices and convolutions both."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = precision
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def deform_rows_on_cuda(case: tuple[int, ...], rounds: int) -> Iterator[Row]:
    for dtype, precision in (
        (torch.float32, "ieee"),
        (torch.float32, "tf32"),
        (torch.bfloat16, "ieee"),
        (torch.float16, "ieee"),
    ):
        with products_in(precision):
            for name, *times in deform_rows(case, torch.channels_last, rounds, "cuda", dtype):
                yield (f"{name}, TF32" if precision == "tf32" else name, *times)


def nms_row(count: int, threshold: float, clustered: bool, rounds: int, device: str = "cpu") -> Row:
    draw = torch.Generator().manual_seed(0)
    centre = torch.rand(count, 2, generator=draw) * torch.tensor([1216.0, 800.0])
    if clustered:  # around 60 objects, as a region proposal network gives them
        centre = centre[torch.arange(count) % 60] + torch.randn(count, 2, generator=draw) * 12
    side = torch.exp(torch.randn(count, 2, generator=draw) * 0.5 + 4)
    boxes = torch.cat([centre - side / 2, centre + side / 2], 1).to(device)
    scores = torch.rand(count, generator=draw).to(device)
    calls = [lambda: nms(boxes, scores, threshold), lambda: torchvision.ops.nms(boxes, scores, threshold)]
    kind = "clustered" if clustered else "uniform"
    ours, theirs = medians(calls, rounds, device)
    return f"nms {count} boxes, {kind}, threshold {threshold} ({len(calls[0]())} kept)", ours, theirs, None


def all_rows(rounds: int, device: str) -> Iterator[Row]:
    for case in DEFORM_CASES:
        if device == "cuda":
            yield from deform_rows_on_cuda(case, rounds)
        else:
            for memory_format in (torch.channels_last, torch.contiguous_format):
                yield from deform_rows(case, memory_format, rounds)
    for count, threshold in NMS_CASES:
        for clustered in (False, True):
            yield nms_row(count, threshold, clustered, rounds, device)


def processor() -> str:
    """Model name and the widest instructions that torch sees."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def table(rounds: int, device: str) -> str:
    on = torch.cuda.get_device_name() if device == "cuda" else f"{processor()}, {torch.get_num_threads()} threads"
    lines = [
        f"# Operators on the {'GPU' if device == 'cuda' else 'CPU'}, against torchvision",
        "",
        f"{datetime.date.today()}, {on}, float32 where no other type is named, "
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, Python {platform.python_version()}.",
        f"{describe()}.",
        f"Milliseconds, medians of {rounds} rounds (half for backward), contestants taking turns in one process;",
        "ratio = torchvision / ours. Plain = `conv2d` of equal size. Offsets are normal with deviation 2.",
        "",
        "| case | ours | torchvision | ratio | plain |",
        "|---|---|---|---|---|",
    ]
    for name, ours, theirs, plain in tqdm(all_rows(rounds, device), unit="row"):
        last = "" if plain is None else f"{plain:.2f}"
        lines.append(f"| {name} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.1f} | {last} |")
    return "\n".join(lines) + "\n"


def run(description: str, table: Callable[..., str], rounds: int, devices: tuple[str, ...] = ()) -> None:
    """The command line of a benchmark: prints its table and writes it with --out.

    `table` takes the number of rounds and, if there is a choice of devices, the device.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--rounds", type=int, default=rounds)
    if devices:
        parser.add_argument("--device", choices=devices, default=devices[0])
    options = vars(parser.parse_args())
    out = options.pop("out")
    text = table(**options)
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)


if __name__ == "__main__":
    run(__doc__, table, rounds=7, devices=("cpu", "cuda"))
