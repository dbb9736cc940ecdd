"""Photo to panoptic result: UPSNet-50 against torchvision's Mask R-CNN R50-FPN on the same photo, in one process.

    python benchmarks/inference.py --data DIR --weights FILE [--out table.md] [--rounds 7] [--device cuda]

DIR is in the official COCO layout, FILE a ResNet-50 in caffe's convention, from which both networks start. Their heads
are untrained; so that both do the work of trained ones, the last layers are spread and the thresholds are set by
the scores that come: 1,000 proposals, 100 detections and, for ours, 100 panoptic candidates, which is asserted.
Where transformers is installed, its Mask2Former with a ResNet-50 (the network alone) stands beside them. They take
turns; the figures are medians.
"""

import argparse
import datetime
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import maskrcnn_resnet50_fpn

import upsnet
from benchmarks.operators import matrix_rates, medians, parser_of, processor, show
from upsnet import builders
from upsnet.config import load_recipe
from upsnet.dataset.batches import collate
from upsnet.engine.precision import Precision, autocast
from upsnet.models import upsnet as system
from upsnet.operators import describe
from upsnet.predict import Picture, Predictor
from upsnet.structures.class_tables import class_table
from upsnet.structures.pictures import read_photo
from upsnet.structures.results import OUTPUTS

RECIPE = "upsnet_resnet50_coco_16gpu"
HEIGHT, WIDTH = 800, 1216
PROPOSALS, INSTANCES = 1000, 100
CANDIDATES = 1500
"""Pairs of proposal and class above the thresholds, so many that suppression leaves more than it may give."""

MODULES = ("backbone", "fpn", "rpn", "box_head", "mask_head", "semantic_head")
FUNCTIONS = ("propose", "decode_above", "suppress", "fuse", "labels_on_photo", "merge_segments", "detections_on_photo")
Predict = Callable[[], object]


def spread(layers: dict[nn.Module, float], run: Callable[[], object]) -> None:
    """Untrained last layers say nearly the same of everything. Draws their weights anew and scales them, while `run`
    passes a photo through them, so that what they say deviates by this much from place to place."""
    draw = torch.Generator().manual_seed(0)

    def scale(layer: nn.Module, _: object, output: Tensor) -> Tensor:
        factor = layers[layer] / output.std()
        layer.weight.mul_(factor)
        return output * factor

    with torch.no_grad(), ExitStack() as hooks:
        for layer in layers:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=draw))
            layer.bias.zero_()
            hooks.callback(layer.register_forward_hook(scale).remove)
        run()


def threshold_of(logits: Tensor) -> float:
    """The probability that CANDIDATES pairs of proposal and class exceed."""
    probabilities = logits.softmax(dim=1)[:, 1:].flatten().sort(descending=True).values
    return float(probabilities[CANDIDATES])


@contextmanager
def watched(module: nn.Module) -> Iterator[list[tuple[tuple, object]]]:
    """Arguments and results of the calls of a module."""
    calls: list[tuple[tuple, object]] = []
    hook = module.register_forward_hook(lambda _, given, result: calls.append((given, result)))
    yield calls
    hook.remove()


class Ours:
    """UPSNet-50 as a user gets it: `upsnet.load` and `predict`."""

    def __init__(self, options: argparse.Namespace, photo: Picture) -> None:
        self.options, self.photo = options, photo
        recipe, categories = load_recipe(RECIPE, self.changes()), class_table("coco")
        assert categories is not None
        network = builders.build_network(recipe, categories)
        builders.start_from_pretrained(recipe, network, categories)
        self.batch = collate([builders.test_views(recipe).sample(photo, 0, "")])
        self.plain = torch.inference_mode()(lambda: network.eval()(self.batch))
        spread(
            {
                network.rpn.objectness: 2.0,
                network.rpn.deltas: 0.2,
                network.box_head.class_logits: 3.0,
                network.box_head.deltas: 0.5,
            },
            self.plain,
        )
        with watched(network.box_head) as calls:
            self.plain()
        self.threshold = threshold_of(calls[0][1][0])
        self.folder = tempfile.TemporaryDirectory()
        self.weights = Path(self.folder.name) / "network.pth"
        torch.save(network.state_dict(), self.weights)
        self.gflop = self.count(network)

    def changes(self, *more: str) -> list[str]:
        return [
            f"network.pretrained={self.options.weights}",
            "network.pretrained_convention=caffe",
            "network.pixel_means=[103.939,116.779,123.68]",  # those of this backbone
            f"test.scales=[{HEIGHT}]",
            f"test.max_size={WIDTH}",
            f"test.rpn_post_nms_top_n={PROPOSALS}",
            f"test.max_det={INSTANCES}",
            *more,
        ]

    def count(self, network: system.UPSNet) -> float:
        """GFLOP of a photo, a multiplication and an addition counted as two."""

        def deformable(input: tuple, offset: tuple, weight: tuple, *rest: object, out_shape: tuple, **_: object) -> int:
            return 2 * out_shape[0] * out_shape[2] * out_shape[3] * weight[0] * weight[1] * weight[2] * weight[3]

        kept = network.selection
        network.selection = replace(
            kept,
            detections=replace(kept.detections, score_threshold=self.threshold),
            panoptic_score_threshold=self.threshold,
        )
        mapping = {torch.ops.upsnet.deform_conv2d: deformable}
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            self.plain()
        network.selection = kept
        return counter.get_total_flops() / 1e9

    def load(self, *changes: str) -> Predictor:
        thresholds = (f"test.score_thresh={self.threshold}", f"test.panoptic_score_thresh={self.threshold}")
        return upsnet.load(RECIPE, self.weights, self.options.device, self.changes(*thresholds, *changes))

    def predict(self, predictor: Predictor, outputs: Sequence[str] = tuple(OUTPUTS)) -> Predict:
        return lambda: predictor.predict(self.photo, outputs)

    def predict_tensor(self, predictor: Predictor, precision: Precision) -> Predict:
        """From a photo that is a tensor on the device already, to the panoptic map alone."""
        device = torch.device(self.options.device)
        network, batch, outputs = predictor.prepared, self.batch.to(device), frozenset({"panoptic"})

        @torch.inference_mode()
        def run() -> object:
            with autocast(device, precision):
                return network(batch, outputs)

        return run


class MaskRCNN:
    """torchvision's, with the same backbone weights; it takes the photo as a tensor."""

    def __init__(self, options: argparse.Namespace, photo: Picture) -> None:
        network = maskrcnn_resnet50_fpn(
            weights=None,
            weights_backbone=None,
            num_classes=81,
            min_size=HEIGHT,
            max_size=WIDTH,
            rpn_post_nms_top_n_test=PROPOSALS,
            box_detections_per_img=INSTANCES,
        )
        tensors = torch.load(options.weights, weights_only=True)
        network.backbone.body.load_state_dict({k: tensors[k].float() for k in network.backbone.body.state_dict()})
        # What the weights were trained with: BGR, 0..255, less the means. The photo comes as 0..1.
        network.transform.image_mean = [m / 255 for m in (103.939, 116.779, 123.68)]
        network.transform.image_std = [1 / 255] * 3
        self.network = network.eval().to(options.device)
        self.photo = torch.from_numpy(photo[..., ::-1].copy()).permute(2, 0, 1).to(options.device) / 255
        head, predictor = network.rpn.head, network.roi_heads.box_predictor
        layers = {head.cls_logits: 2.0, head.bbox_pred: 0.2, predictor.cls_score: 3.0, predictor.bbox_pred: 0.5}
        spread(layers, self.predict)
        with watched(predictor) as calls:
            self.predict()
        network.roi_heads.score_thresh = threshold_of(calls[0][1][0])
        with watched(predictor) as calls, FlopCounterMode(display=False) as counter:
            found = self.predict()
        self.gflop = counter.get_total_flops() / 1e9
        assert len(calls[0][0][0]) == PROPOSALS, f"Mask R-CNN: {len(calls[0][0][0])} proposals"
        assert len(found["masks"]) == INSTANCES, f"Mask R-CNN: {len(found['masks'])} detections"

    @torch.inference_mode()
    def predict(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.network([self.photo])[0]
        return found


def mask2former(options: argparse.Namespace, photo: Picture) -> Predict | None:
    """transformers' Mask2Former with a ResNet-50, random weights, the network alone; None where it is not installed."""
    try:
        from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig
    except ImportError:
        return None
    body = ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    config = Mask2FormerConfig(backbone_config=body, num_labels=133)
    network = Mask2FormerForUniversalSegmentation(config).eval().to(options.device)
    image = torch.from_numpy(photo.astype(np.float32)).permute(2, 0, 1)[None].to(options.device) / 255
    return torch.inference_mode()(lambda: network(image))


def check_counts(predictor: Predictor, run: Predict) -> None:
    """Proposals, detections and panoptic candidates of a pass."""
    found: list[int] = []

    def counted(*given: object, **options: object) -> Tensor:
        positions: Tensor = suppress(*given, **options)
        found.append(len(positions))
        return positions

    suppress = system.suppress
    with mock.patch.object(system, "suppress", counted), watched(predictor.prepared.box_head) as calls:
        run()
    proposals = len(calls[0][0][1])
    assert proposals == PROPOSALS, f"ours: {proposals} proposals"
    assert found == [INSTANCES] * 2, f"ours: {found} detections and panoptic candidates"


def shares(predictor: Predictor, run: Predict, rounds: int) -> list[tuple[str, float]]:
    """Median milliseconds of each stage of a pass, and of all that is in none."""
    network = predictor.prepared
    wait = torch.cuda.synchronize if next(network.parameters()).is_cuda else lambda: None
    times: dict[str, list[float]] = {name: [] for name in (*MODULES, *FUNCTIONS, "all")}

    def timed(name: str, call: Callable) -> Callable:
        def run_timed(*given: object, **options: object) -> object:
            wait()
            start = time.perf_counter()
            result = call(*given, **options)
            wait()
            times[name][-1] += (time.perf_counter() - start) * 1e3
            return result

        return run_timed

    with ExitStack() as patches:
        for name in MODULES:
            module = getattr(network, name)
            patches.enter_context(mock.patch.object(module, "forward", timed(name, module.forward)))
        for name in FUNCTIONS:
            patches.enter_context(mock.patch.object(system, name, timed(name, getattr(system, name))))
        for _ in range(rounds):
            for record in times.values():
                record.append(0.0)
            timed("all", run)()
    middle = {name: float(np.median(record)) for name, record in times.items()}
    rest = middle.pop("all") - sum(middle.values())
    return [*middle.items(), ("photo to tensor, and the rest", rest)]


def table(options: argparse.Namespace) -> str:
    photo = cv2.resize(read_photo(photo_path(options)), (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR)
    ours, theirs = Ours(options, photo), MaskRCNN(options, photo)
    fp32, bf16 = ours.load("test.precision=fp32"), ours.load("test.precision=bf16")
    on_cuda = options.device == "cuda"
    recorded = ours.load("test.precision=bf16", "test.cuda_graph=true") if on_cuda else bf16
    alone = ("panoptic",)
    runs: dict[str, tuple[Predict, float | None]] = {
        "UPSNet-50, fp32": (ours.predict(fp32), ours.gflop),
        "UPSNet-50, bf16": (ours.predict(bf16), ours.gflop),
        "UPSNet-50, fp32, the panoptic map alone": (ours.predict(fp32, alone), None),
        "UPSNet-50, bf16, the panoptic map alone": (ours.predict(bf16, alone), None),
        f"the same from a tensor{', as a CUDA graph' if on_cuda else ''}": (
            ours.predict_tensor(recorded, "bf16"),
            None,
        ),
        "torchvision Mask R-CNN R50-FPN, fp32": (theirs.predict, theirs.gflop),
    }
    other = mask2former(options, photo)
    if other is not None:
        runs["transformers Mask2Former-R50, fp32, network alone"] = (other, None)
    for predictor in (fp32, bf16):
        check_counts(predictor, ours.predict(predictor))
    times = medians([run for run, _ in runs.values()], options.rounds, options.device)
    reference = times[list(runs).index("torchvision Mask R-CNN R50-FPN, fp32")]
    device = torch.cuda.get_device_name() if on_cuda else processor()
    lines = [
        "# From a photo to its panoptic result",
        "",
        f"{datetime.date.today()}, {device}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, Python {platform.python_version()}.",
        f"{describe()}.",
        matrix_rates(options.rounds, options.device),
        "",
        f"One photo ({photo_path(options).name}, {HEIGHT}×{WIDTH}), {PROPOSALS} proposals, {INSTANCES} detections, for "
        f"ours {INSTANCES} panoptic candidates as well; medians of {options.rounds} rounds, taking turns in one "
        "process. Mask R-CNN's masks are pasted to full size, ours are run lengths.",
        "",
        "| network | ms | of Mask R-CNN | GFLOP | GFLOP/s |",
        "|---|---|---|---|---|",
    ]
    for (name, (_, gflop)), milliseconds in zip(runs.items(), times, strict=True):
        work = "| |" if gflop is None else f"{gflop:.0f} | {gflop / milliseconds * 1e3:.0f} |"
        lines.append(f"| {name} | {milliseconds:.0f} | {milliseconds / reference:.2f} | {work}")
    lines += ["", "| stage of UPSNet-50 | fp32, ms | bf16, ms |", "|---|---|---|"]
    stages = [shares(predictor, ours.predict(predictor), options.rounds) for predictor in (fp32, bf16)]
    lines += [f"| {name} | {one:.1f} | {two:.1f} |" for (name, one), (_, two) in zip(*stages, strict=True)]
    return "\n".join(lines) + "\n"


def photo_path(options: argparse.Namespace) -> Path:
    found = sorted(options.data.glob(f"**/{options.photo:012d}.jpg"))
    if not found:
        sys.exit(f"no photo {options.photo:012d}.jpg under {options.data}")
    return found[0]


def main() -> None:
    parser = parser_of(__doc__, rounds=7)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--weights", required=True, type=Path)
    parser.add_argument("--photo", type=int, default=25, help="image id")
    options = parser.parse_args()
    show(table(options), options.out)


if __name__ == "__main__":
    main()
