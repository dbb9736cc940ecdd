"""A small UPSNet and photos for it, without files."""

from dataclasses import replace

import cv2
import numpy as np
import torch
from torch import nn

from upsnet.dataset.batches import collate
from upsnet.dataset.transforms import quarter_masks, resize_labels, scaled_size
from upsnet.models.box_head import BoxHead, DetectionOptions
from upsnet.models.fpn import FPN
from upsnet.models.mask_head import MaskHead
from upsnet.models.matching import AnchorSampling, RoISampling
from upsnet.models.resnet import ResNet
from upsnet.models.rpn import RPN, ProposalOptions
from upsnet.models.semantic_head import SemanticHead
from upsnet.models.upsnet import SamplingOptions, SelectionOptions, UPSNet
from upsnet.structures.draws import SeededDraws
from upsnet.structures.masks import Bitmap, Masks, Polygons
from upsnet.structures.sample import VOID, Instances, Sample, Targets

THINGS, STUFF = 3, 2
LOSSES = {
    "rpn_cls_loss", "rpn_bbox_loss", "cls_loss", "bbox_loss", "mask_loss", "fcn_loss", "fcn_roi_loss", "panoptic_loss"
}  # fmt: skip


def small_network(
    seed=0,
    things=THINGS,
    stuff=STUFF,
    norm="none",
    backbone_norm="frozen_batch_norm",
    freeze_at=0,
    lively=False,
    sampling=None,
    selection=None,
    **backbone,
):
    """ResNet-18 and narrow heads. lively: weights of a size with which an untrained network finds things."""
    torch.manual_seed(seed)
    body = ResNet(18, norm=backbone_norm, freeze_at=freeze_at, **backbone)
    network = UPSNet(
        body,
        FPN(body.out_channels, 32, global_average=True, norm=norm),
        RPN(32),
        BoxHead(32, things + 1, 64, norm),
        MaskHead(32, things + 1, 32, 28, norm),
        SemanticHead(32, stuff + things, 32, 2, norm),
        stuff,
        sampling
        or SamplingOptions(
            AnchorSampling(64), ProposalOptions(pre_nms=100, post_nms=50), RoISampling(32), with_roi_loss=True
        ),
        selection
        or SelectionOptions(
            ProposalOptions(pre_nms=60, post_nms=40), DetectionOptions(0.3, max_detections=20), 0.4, stuff_area_limit=16
        ),
    )
    if lively:
        enliven(network)
    return network


def enliven(network):
    """An untrained network says the same everywhere: makes it sure of different things in different places."""
    with torch.no_grad():
        for layer in (network.box_head.class_logits, network.rpn.objectness):
            layer.weight.mul_(30)
        network.box_head.deltas.weight.mul_(20)
        network.semantic_head.score.weight.mul_(3)
        for layer in network.semantic_head.layers:
            nn.init.normal_(layer.conv.offset.weight, std=0.02)


def photo_sample(image_id=1, size=(48, 64), scale=1.5, things=(), stuff=True, crowds=(), void=False, kind="polygon"):
    """things, crowds: (class, (x1, y1, x2, y2)) in photo pixels, inclusive. Everything else is stuff, or void."""
    height, width = size
    draws = np.random.default_rng(image_id)
    noise = cv2.resize(draws.normal(size=(height // 6 + 1, width // 6 + 1, 3)).astype(np.float32), (width, height))
    semantic = np.full(size, VOID, dtype=np.int16)
    if stuff:
        semantic[: height // 2], semantic[height // 2 :] = 0, STUFF - 1
    boxes, classes, masks = [], [], []
    for label, (x1, y1, x2, y2) in [*things, *crowds]:
        drawn = np.zeros(size, dtype=bool)
        drawn[y1 : y2 + 1, x1 : x2 + 1] = True
        noise[drawn] += draws.normal(size=3)
        semantic[drawn] = STUFF - 1 + label
        corners = np.array([x1, y1, x2, y1, x2, y2, x1, y2], dtype=np.float64)
        masks.append(Polygons((corners,)) if kind == "polygon" else Bitmap.from_map(drawn))
        boxes.append([float(v) for v in (x1, y1, x2, y2)])
        classes.append(label)
    if void:
        semantic[:] = VOID
    is_crowd = torch.tensor([False] * len(things) + [True] * len(crowds), dtype=torch.bool)
    instances = Instances(
        torch.tensor(boxes).reshape(-1, 4), torch.tensor(classes, dtype=torch.int64), is_crowd, Masks(masks)
    )
    network_size = scaled_size(height, width, scale)
    image = torch.from_numpy(cv2.resize(noise, None, fx=scale, fy=scale)).permute(2, 0, 1).contiguous() * 2
    targets = Targets(
        instances,
        torch.from_numpy(resize_labels(semantic, scale)),
        torch.from_numpy(quarter_masks(instances.without_crowd().masks, network_size, scale)),
    )
    return Sample(image_id, f"{image_id}.jpg", image, size, scale, False, targets)


BALL, BOX, KITE = (1, (5, 4, 30, 25)), (2, (28, 20, 60, 44)), (3, (2, 30, 14, 46))
SAMPLES = {
    "things and stuff": {"things": [BALL, BOX, KITE]},
    "bitmaps": {"things": [BALL, BOX], "kind": "bitmap"},
    "no things": {},
    "no stuff": {"things": [(1, (0, 0, 63, 23)), (2, (0, 24, 63, 47))], "stuff": False},
    "crowd only": {"crowds": [BOX]},
    "things and crowd": {"things": [BALL], "crowds": [BOX]},
    "one pixel": {"things": [(1, (10, 10, 10, 10)), (2, (63, 47, 63, 47)), (3, (0, 0, 0, 0))], "kind": "bitmap"},
    "void everywhere": {"things": [BALL], "void": True},
    "nothing at all": {"stuff": False},
}


def training_batch(*names, step=0, seed=0):
    """A batch of the kinds of `SAMPLES`; an image's number is its kind's, so its draws do not depend on the batch."""
    samples = [photo_sample(list(SAMPLES).index(name) + 1, **SAMPLES[name]) for name in names]
    batch = collate(samples)
    return replace(batch, draws=[SeededDraws(seed, step, image_id, 0) for image_id in batch.image_ids])
