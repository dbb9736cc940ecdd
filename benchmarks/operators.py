"""Our operators against torchvision's, in one process: `python benchmarks/operators.py [--out table.md] [--rounds 7]`.

The contestants take turns (ours, torchvision, ours, …), so that a load on the machine meets all of them; the figures
are medians. The ratio is torchvision's time over ours. For scale, the plain convolution of equal size. With
`--device cuda` every call is waited for.
"""

import argparse
import contextlib
import ctypes
import datetime
import functools
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision
from pycocotools import mask as coco_mask
from torchvision.models.detection.roi_heads import paste_masks_in_image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from upsnet import builders
from upsnet.config import load_recipe
from upsnet.dataset.batches import collate
from upsnet.models.rpn import propose
from upsnet.operators import (
    batched_nms,
    caffe_sgd_,
    deform_conv2d,
    describe,
    fuse_panoptic,
    nms,
    paste_masks,
    pyramid_roi_align,
)
from upsnet.operators.panoptic_head import fuse_plain
from upsnet.structures.class_tables import class_table
from upsnet.structures.pictures import read_photo

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
NMS_CASES = [(100, 0.5), (1000, 0.5), (2000, 0.7), (6000, 0.5), (6000, 0.7), (12000, 0.7)]
Row = tuple[str, float, float, float | None] | tuple[str, float, float, float | None, float]
"""Case; milliseconds of ours, the other's and the plain operator's; GFLOP of the case, where they say something."""


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
        return lambda x, offset, weight, **options: operator(x.float(), offset.float(), weight.float(), **options).to(
            dtype
        ), ", torchvision casts to float32"
    return lambda x, offset, weight, **options: operator(x, offset.to(dtype), weight, **options), ""


def deform_rows(
    case: tuple[int, ...],
    memory_format: torch.memory_format,
    rounds: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    modulated: bool = False,
) -> Iterator[Row]:
    """A 3×3 convolution; `modulated`: with stride 2, dilation 2, mask and four offset groups."""
    images, channels, outputs, height, width = case
    step, groups = (2, 4) if modulated else (1, 1)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(images, channels, height, width, generator=draw).contiguous(memory_format=memory_format)
    size = (height // step, width // step)
    offset = (torch.randn(images, 18 * groups, *size, generator=draw) * 2).to(device)
    mask = torch.rand(images, 9 * groups, *size, generator=draw).to(device)
    weight = torch.randn(outputs, channels, 3, 3, generator=draw)
    upstream = torch.randn(images, outputs, *size, generator=draw).contiguous(memory_format=memory_format)
    x, weight, upstream = (tensor.to(device, dtype) for tensor in (x, weight, upstream))
    leaves = [tensor.requires_grad_() for tensor in (x, offset, weight)]
    theirs, note = torchvisions_deform_conv2d(dtype, device)
    plain = {"stride": step, "padding": step, "dilation": step}
    options = {**plain, "mask": mask} if modulated else plain
    calls = [
        lambda: deform_conv2d(x, offset, weight, **options),
        lambda: theirs(x, offset, weight, **options),
        lambda: torch.nn.functional.conv2d(x, weight, **plain),
    ]

    def and_backward(call: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(), leaves, upstream, allow_unused=True)

    layout = "channels-last" if memory_format == torch.channels_last else "contiguous"
    kind = ", stride 2, dilation 2, mask, 4 offset groups" if modulated else ""
    name = f"deform_conv2d {images}×{channels}→{outputs}, {height}×{width}{kind}, {layout}, {str(dtype)[6:]}{note}"
    work = 2e-9 * images * size[0] * size[1] * outputs * channels * 9
    with torch.no_grad():
        yield (f"{name}, forward", *medians(calls, rounds, device), work)
    backwards = [and_backward(call) for call in calls]
    yield (f"{name}, forward + backward", *medians(backwards, max(3, rounds // 2), device), 3 * work)


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
            for name, *figures in deform_rows(case, torch.channels_last, rounds, "cuda", dtype):
                yield (f"{name}, TF32" if precision == "tf32" else name, *figures)


def nms_rows(count: int, threshold: float, rounds: int, device: str = "cpu") -> Iterator[Row]:
    """Boxes anywhere, and around 60 objects as a region proposal network gives them; these in 80 classes as well."""
    draw = torch.Generator().manual_seed(0)
    anywhere = torch.rand(count, 2, generator=draw) * torch.tensor([1216.0, 800.0])
    around = anywhere[torch.arange(count) % 60] + torch.randn(count, 2, generator=draw) * 12
    side = torch.exp(torch.randn(count, 2, generator=draw) * 0.5 + 4)
    scores = torch.rand(count, generator=draw).to(device)
    classes = torch.randint(80, (count,), generator=draw).to(device)
    for kind, centre, functions, groups in (
        ("uniform", anywhere, (nms, torchvision.ops.nms), ()),
        ("clustered", around, (nms, torchvision.ops.nms), ()),
        ("clustered, 80 classes", around, (batched_nms, torchvision.ops.batched_nms), (classes,)),
    ):
        boxes = torch.cat([centre - side / 2, centre + side / 2], 1).to(device)
        calls = [functools.partial(function, boxes, scores, *groups, threshold) for function in functions]
        name = f"nms {count} boxes, {kind}, threshold {threshold} ({len(calls[0]())} kept)"
        yield name, *medians(calls, rounds, device), None


def photo_case() -> tuple[list[torch.Tensor], torch.Tensor, str]:
    """P2..P5 of a photo at 800×1216, the 1,000 boxes of an RPN on it, and whose they are.

    The backbone knows ImageNet, what stands on it is untrained. Where the data are not there: numbers drawn at random,
    boxes of about the same sizes.
    """
    data = Path(__file__).resolve().parents[2] / "shared/data"
    photo = data / "coco_mini/images/val2017/000000000139.jpg"
    weights = data / "resnet50_imagenet/resnet50_caffe_imagenet_fp16.pth"
    if not (photo.is_file() and weights.is_file()):
        levels = [torch.randn(1, 256, 800 // 2**i, 1216 // 2**i) for i in range(2, 6)]
        levels = [level.contiguous(memory_format=torch.channels_last) for level in levels]
        return levels, spread_boxes(3.8, 0.4), "random boxes of an RPN's sizes"
    overrides = {"network.pretrained": str(weights), "network.pretrained_convention": "caffe"}
    recipe, categories = load_recipe("upsnet_resnet50_coco_16gpu", overrides), class_table("coco")
    assert categories is not None
    network = builders.build_network(recipe, categories).eval()
    builders.start_from_pretrained(recipe, network, categories)
    batch = collate([builders.test_views(recipe).sample(read_photo(photo))])
    with torch.no_grad():
        levels = network.fpn(network.backbone(batch.images))
        found = propose(network.rpn(levels), batch.sizes, batch.scales, network.selection.proposals)
    return levels[:4], torch.nn.functional.pad(found.trimmed()[0], (1, 0)), "boxes of an RPN on a photo"


def spread_boxes(mean: float, deviation: float, count: int = 1000) -> torch.Tensor:
    """RoIs anywhere in an 800×1216 photo whose sides have this mean logarithm and deviation of it."""
    draw = torch.Generator().manual_seed(0)
    limit = torch.tensor([1216.0, 800.0])
    centre = torch.rand(count, 2, generator=draw) * limit
    side = torch.exp(torch.randn(count, 2, generator=draw) * deviation + mean)
    corners = [(centre - side / 2).clamp(min=0), torch.minimum(centre + side / 2, limit - 1)]
    return torch.cat([torch.zeros(count, 1), *corners], dim=1)


def roi_align_rows(rounds: int, device: str = "cpu") -> Iterator[Row]:
    """Ours gets the network's channels-last maps, torchvision the contiguous ones on which it is faster."""
    levels, rois, whose = photo_case()
    levels = [level.to(device) for level in levels]
    contiguous = [level.contiguous() for level in levels]
    pool = torchvision.ops.MultiScaleRoIAlign([str(i) for i in range(4)], 7, 2)
    for kind, given in ((whose, rois.to(device)), ("boxes of all sizes", spread_boxes(4.6, 0.8).to(device))):

        def ours(maps: Sequence[torch.Tensor], given: torch.Tensor = given) -> torch.Tensor:
            return pyramid_roi_align(maps, given, 7)

        def theirs(maps: Sequence[torch.Tensor], given: torch.Tensor = given) -> torch.Tensor:
            return pool({str(i): level for i, level in enumerate(maps)}, [given[:, 1:]], [(800, 1216)])

        def and_backward(call: Callable[..., torch.Tensor], maps: Sequence[torch.Tensor]) -> Callable[[], object]:
            leaves = [level.detach().requires_grad_() for level in maps]
            return lambda: torch.autograd.grad((pooled := call(leaves)), leaves, torch.ones_like(pooled))

        name = f"RoIAlign over P2..P5, {len(given)} {kind}, 7×7×256"
        calls = [functools.partial(ours, levels), functools.partial(theirs, contiguous)]
        with torch.no_grad():
            yield f"{name}, forward", *medians(calls, rounds, device), None
        backwards = [and_backward(ours, levels), and_backward(theirs, contiguous)]
        yield f"{name}, forward + backward", *medians(backwards, max(3, rounds // 2), device), None


def paste_row(rounds: int) -> Row:
    """100 masks to COCO's run lengths; torchvision fills a plane for each, which pycocotools packs."""
    size, boxes = (800, 1216), spread_boxes(5, 0.7, 100)[:, 1:]
    masks = torch.nn.functional.interpolate(torch.randn(100, 1, 4, 4) * 3, size=(28, 28), mode="bicubic").sigmoid()

    def theirs() -> object:
        planes = paste_masks_in_image(masks, boxes, size)[:, 0] > 0.5
        return [coco_mask.encode(np.asfortranarray(plane)) for plane in planes.byte().numpy()]

    calls = [lambda: paste_masks(masks[:, 0], boxes.numpy(), size), theirs]
    return ("masks to run lengths, 100 on 800×1216", *medians(calls, rounds), None)


def sgd_row(rounds: int) -> Row:
    """All parameters of a ResNet-50 in channels-last; the other is torch's own optimiser, fused."""
    network = torchvision.models.resnet50().to(memory_format=torch.channels_last)
    parameters = list(network.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    gradients, buffers = [p.grad for p in parameters], [torch.zeros_like(p) for p in parameters]
    optimizer = torch.optim.SGD(parameters, 1e-6, momentum=0.9, weight_decay=1e-4, fused=True)
    calls = [lambda: caffe_sgd_(parameters, gradients, buffers, 1e-6, 0.9, 1e-4), optimizer.step]
    return ("SGD step of a ResNet-50 (beside torch.optim.SGD, fused)", *medians(calls, rounds), None)


def extra_memory(call: Callable[[], object], device: str) -> float:
    """MB by which a call raises the peak of the memory in use: the device's, or the process' (Linux alone tells it)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL(None).malloc_trim(0)  # memory that the process keeps for later would not count
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(name: str) -> float:
    """A figure of the process' memory in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(name))) / 1e3


def panoptic_head_rows(rounds: int, device: str = "cpu") -> Iterator[Row]:
    """Scores and masks to label maps, COCO's classes, 100 candidates; the other is the plain path in PyTorch."""
    draw = torch.Generator().manual_seed(0)
    enlarge = functools.partial(torch.nn.functional.interpolate, mode="bicubic")
    scores = enlarge(torch.randn(1, 133, 25, 38, generator=draw) * 4, size=(200, 304))
    masks = (enlarge(torch.randn(100, 1, 5, 5, generator=draw) * 4, size=(28, 28))[:, 0] + 2).to(device)
    boxes = spread_boxes(4.6, 0.6, 100)[:, 1:].to(device)
    classes = torch.randint(1, 81, (100,), generator=draw).to(device)
    for layout in (torch.channels_last, torch.contiguous_format):
        given = (scores.contiguous(memory_format=layout)[0].to(device), (800, 1216), boxes, classes, masks, 53, True)
        calls: list[Callable[[], object]] = [functools.partial(f, *given) for f in (fuse_panoptic, fuse_plain)]
        memory = " and ".join(f"{extra_memory(call, device):.0f}" for call in calls) + " MB"
        kind = "channels-last" if layout == torch.channels_last else "contiguous"
        name = f"panoptic head 800×1216, 133 classes, 100 candidates, {kind}, beside its plain path; memory {memory}"
        with torch.inference_mode():
            yield (name, *medians(calls, rounds, device), None)


def all_rows(rounds: int, device: str) -> Iterator[Row]:
    for case in DEFORM_CASES:
        if device == "cuda":
            yield from deform_rows_on_cuda(case, rounds)
        else:
            for memory_format in (torch.channels_last, torch.contiguous_format):
                yield from deform_rows(case, memory_format, rounds)
    if device == "cpu":
        for memory_format in (torch.channels_last, torch.contiguous_format):
            yield from deform_rows((2, *DEFORM_CASES[0][1:]), memory_format, rounds, modulated=True)
        yield from deform_rows(DEFORM_CASES[0], torch.channels_last, rounds, dtype=torch.bfloat16)
    for count, threshold in NMS_CASES:
        yield from nms_rows(count, threshold, rounds, device)
    yield from roi_align_rows(rounds, device)
    yield from panoptic_head_rows(rounds, device)
    if device == "cpu":
        yield paste_row(rounds)
        yield sgd_row(rounds)


def processor() -> str:
    """Model name and the widest instructions that torch sees."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def matrix_rates(rounds: int, device: str) -> str:
    """What the machine multiplies at, for scale: GFLOP/s of `torch.mm` and of a plain convolution."""
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.randn(4864, 2304).to(device, dtype), torch.randn(2304, 256).to(device, dtype)
        x = torch.randn(1, 256, 200, 304).to(device, dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(256, 256, 3, 3).to(device, dtype)
        times = medians(
            [
                functools.partial(torch.mm, left, right),
                functools.partial(torch.nn.functional.conv2d, x, weight, padding=1),
            ],
            rounds,
            device,
        )
        work = (2e-9 * 4864 * 2304 * 256, 2e-9 * 200 * 304 * 256 * 256 * 9)
        each = [f"{flop / time * 1e3:.0f}" for flop, time in zip(work, times, strict=True)]
        rates.append(f"{each[0]} by `torch.mm` and {each[1]} by a 3×3 `conv2d` in {str(dtype)[6:]}")
    return f"GFLOP/s of this machine: {'; '.join(rates)}."


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
        f"GFLOP/s are ours. {matrix_rates(rounds, device)}",
        "",
        "| case | ours | torchvision | ratio | plain | GFLOP/s |",
        "|---|---|---|---|---|---|",
    ]
    for name, ours, theirs, plain, *work in tqdm(all_rows(rounds, device), unit="row"):
        of_plain = "" if plain is None else f"{plain:.2f}"
        rate = f"{work[0] / ours * 1e3:.0f}" if work else ""
        lines.append(f"| {name} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.1f} | {of_plain} | {rate} |")
    return "\n".join(lines) + "\n"


def positive(text: str) -> int:
    """An option's whole number from 1 on."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 1 on")
    return int(text)


def device_here(name: str) -> str:
    """An option's device, refused where it is missing."""
    if name == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch sees no CUDA device here")
    return name


def parser_of(description: str, rounds: int, devices: tuple[str, ...] = ("cpu", "cuda")) -> argparse.ArgumentParser:
    """What all benchmarks with rounds are asked: --out, --rounds and, if there is a choice, --device."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--rounds", type=positive, default=rounds)
    if devices:
        parser.add_argument("--device", type=device_here, choices=devices, default=devices[0])
    return parser


def run(description: str, table: Callable[..., str], rounds: int, devices: tuple[str, ...] = ()) -> None:
    """The command line of a benchmark: prints its table and writes it with --out.

    `table` takes the number of rounds and, if there is a choice of devices, the device.
    """
    options = vars(parser_of(description, rounds, devices).parse_args())
    out = options.pop("out")
    show(table(**options), out)


def show(text: str, out: Path | None) -> None:
    """Prints the table of a benchmark, and also writes it where that is wanted."""
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)


if __name__ == "__main__":
    run(__doc__, table, rounds=7, devices=("cpu", "cuda"))
