"""The whole network gives the original's numbers (`oracle_fixtures/forward_*.npz`, `losses_*.npz`)."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.fixtures import NumpyDraws
from tests.models.test_checkpoint_keys import categories_of
from upsnet.builders import build_network, loss_weights
from upsnet.checkpoints.released import our_name
from upsnet.config import load_recipe
from upsnet.dataset.batches import collate
from upsnet.dataset.transforms import Transform, network_scale, quarter_masks, resize_labels
from upsnet.models.rpn import propose
from upsnet.structures.masks import Masks, mask_from_coco
from upsnet.structures.sample import VOID, Instances, Sample, Targets

LARGE = pytest.param("resnet101_dcn_coco_3x_16gpu", marks=pytest.mark.slow)


def weight(name, shape, file):
    """One entry of the fixture's weights, by the recipe of its README."""
    calibration = json.loads(str(file["calib_json"]))
    if f"calib_bias::{name}" in file:
        return file[f"calib_bias::{name}"]
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, dtype=np.int64)
    draws = np.random.RandomState((zlib.crc32(name.encode()) + 1000003 * calibration["seed"]) % 2**32)
    kind = name.rsplit(".", 1)[1]
    if kind == "running_mean":
        value = 0.1 * draws.randn(*shape)
    elif kind == "running_var":
        value = draws.uniform(0.5, 1.5, shape)
    elif kind == "bias":
        value = 0.05 * draws.randn(*shape)
    elif len(shape) == 1:
        value = draws.uniform(0.8, 1.2, shape) * (0.3 if ".bn3." in name else 1)
    else:
        fan_in = shape[0] if "mask_deconv1" in name else np.prod(shape[1:])
        value = draws.randn(*shape) * np.sqrt(2 / fan_in)
        value = value / 60 if name == "resnet_backbone.conv1.conv1.weight" else value
    return value.astype(np.float32) * np.float32(calibration["scale"].get(name, 1))


def network_of(configuration, file, shared):
    name = f"upsnet_{configuration}"
    table = json.loads(shared(f"reference/checkpoint_keys/{name}.json").read_text())
    recipe = load_recipe(name)
    network = build_network(recipe, categories_of(recipe))
    state = {our_name(key): torch.from_numpy(weight(key, shape, file)) for key, (shape, _) in table["entries"].items()}
    network.load_state_dict(state)
    return network


def check(file, key, ours, tolerance=1e-4):
    """A recorded array, whole or as a digest, relative to its maximum."""
    ours = ours.detach().numpy()
    if key in file:
        expected = file[key]
    else:
        assert tuple(file[f"shape::{key}"]) == ours.shape
        ours, expected = ours.ravel()[file[f"pos::{key}"]], file[f"val::{key}"]
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-6), key


def load(path: Path):
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def image_of(file):
    height, width = file["in::image_bgr"].shape[:2]
    short_side = round(float(file["in::im_info"][0, :2].min()))
    scale = network_scale(height, width, short_side, 10**6)
    assert np.float32(scale) == file["in::im_info"][0, 2]
    return Transform((short_side,), 10**6).image(np.ascontiguousarray(file["in::image_bgr"][..., ::-1]), scale), scale


def feed_proposals(file, monkeypatch):
    """Puts the recorded proposals in place of ours: among equal scores the original's choice was arbitrary."""
    rois, scores = torch.from_numpy(file["mid::rois"][:, 1:]), torch.from_numpy(file["mid::roi_scores"])

    def recorded(output, *given):
        boxes, our_scores = propose(output, *given)
        saturated = sum(int((level.sigmoid() == 1).sum()) for level in output.logits)
        if saturated < 100:
            assert len(boxes) == len(rois) and (our_scores - scores).abs().max() < 1e-4
            distance = (boxes[:, None] - rois).abs().amax(dim=2).amin(dim=0)
            assert (distance < 1e-2).float().mean() > 0.99
        return rois, scores

    monkeypatch.setattr("upsnet.models.upsnet.propose", recorded)


@pytest.mark.parametrize("configuration", ["resnet50_coco_16gpu", "resnet50_cityscapes_16gpu", LARGE])
@torch.no_grad()
def test_forward(configuration, shared, monkeypatch):
    file = load(shared(f"reference/oracle_fixtures/forward_{configuration}.npz"))
    network = network_of(configuration, file, shared).eval()
    image, scale = image_of(file)
    batch = collate([Sample(1, "toy.png", image, file["in::image_bgr"].shape[:2], scale)])
    check(file, "in::data", batch.images, 1e-6)
    for i, stage in enumerate(network.backbone(batch.images), start=2):
        check(file, f"mid::res{i}", stage)
    features = network.features(batch.images)
    for i, level in enumerate(features.levels, start=2):
        check(file, f"mid::p{i}", level)
    for i, (logits, deltas) in enumerate(zip(features.rpn.logits, features.rpn.deltas, strict=True)):
        suffix = f"#{i}" if i else ""
        check(file, f"mid::rpn_cls_score{suffix}", logits)
        check(file, f"mid::rpn_bbox_pred{suffix}", deltas)
    check(file, "mid::fcn_score", features.scores)

    feed_proposals(file, monkeypatch)
    (prediction,) = network(batch)
    found = prediction.instances
    expected = file["post::detections_cls_x1y1x2y2_score"]
    order = np.lexsort((-found.scores, found.classes))
    theirs = expected[np.lexsort((-expected[:, 5], expected[:, 0]))]
    assert found.classes[order].tolist() == theirs[:, 0].tolist()
    assert np.abs(found.boxes[order] - theirs[:, 1:5]).max() < 1e-2
    assert np.abs(found.scores[order] - theirs[:, 5]).max() < 1e-4
    assert found.masks == json.loads(str(file["post::rle_json"]))
    assert (prediction.semantic_map != file["post::sseg"]).sum() <= 1  # rounding decides a tie

    pan = file["post::pan_2ch"].astype(np.int64)
    ours = np.zeros(pan.shape[:2], dtype=np.int64)
    for segment in prediction.segments:
        ours[prediction.segment_map == segment.id] = segment.semantic_id + 1
    assert np.array_equal(ours, np.where(pan[..., 0] == 255, 0, pan[..., 0] + 1))
    pairs = np.unique(np.stack([prediction.segment_map.ravel(), (pan[..., 0] * 256 + pan[..., 1]).ravel()], 1), axis=0)
    assert len(pairs) == len(np.unique(pairs[:, 0])) == len(np.unique(pairs[:, 1]))


class NetworkDraws(NumpyDraws):
    """The draws inside the original's network; without candidates it does not draw."""

    def choose(self, candidates, size):
        return super().choose(candidates, size) if len(candidates) else candidates


def feed_anchor_labels(file, monkeypatch):
    """Anchors are drawn in the original's data loader: puts the recorded labels in place of ours."""

    def recorded(anchors, truth, size, options, draws):
        labels, targets = [], []
        height, width = file["mid::rpn_cls_score"].shape[2:]
        for i, stride in enumerate((4, 8, 16, 32, 64)):
            h, w = -(-height // 2**i), -(-width // 2**i)
            labels.append(file[f"in::rpn_labels_fpn{stride}"][0, :, :h, :w].transpose(1, 2, 0).reshape(-1))
            level = file[f"in::rpn_bbox_targets_fpn{stride}"][0, :, :h, :w]
            targets.append(level.reshape(3, 4, h, w).transpose(2, 3, 0, 1).reshape(-1, 4))
        return torch.from_numpy(np.concatenate(labels)), torch.from_numpy(np.concatenate(targets))

    monkeypatch.setattr("upsnet.models.rpn.match_anchors", recorded)


def training_sample(file):
    height, width = file["in::image_bgr"].shape[:2]
    mirrored = slice(None, None, -1 if file["in::flipped"] else 1)
    image, scale = image_of({**file, "in::image_bgr": file["in::image_bgr"][:, mirrored]})
    label = file["in::label_png"][:, mirrored].astype(np.int16)
    semantic = np.where(label == 255, np.int16(VOID), label)
    segmentations = json.loads(str(file["in::roidb_segms_json"]))
    # Mirrored, the original keeps an RLE as the only element of a list.
    segmentations = [s[0] if isinstance(s, list) and isinstance(s[0], dict) else s for s in segmentations]
    masks = [mask_from_coco(s, height, width) for s in segmentations]
    instances = Instances(
        torch.from_numpy(file["in::roidb_boxes"]),
        torch.from_numpy(file["in::roidb_gt_classes"]).long(),
        torch.from_numpy(file["in::roidb_is_crowd"]),
        Masks(masks),
    )
    targets = Targets(
        instances,
        torch.from_numpy(resize_labels(semantic, scale)),
        torch.from_numpy(quarter_masks(instances.without_crowd().masks, image.shape[1:], scale)),
    )
    return Sample(1, "toy.png", image, (height, width), scale, targets=targets)


@pytest.mark.parametrize("kind", ["losses", "losses_flipped"])
@pytest.mark.parametrize("configuration", ["resnet50_coco_16gpu", LARGE])
def test_losses_and_gradients(configuration, kind, shared, monkeypatch):
    file = load(shared(f"reference/oracle_fixtures/{kind}_{configuration}.npz"))
    meta = json.loads(str(file["meta_json"]))
    network = network_of(configuration, file, shared).train()
    batch = collate([training_sample(file)])
    batch.draws = [NetworkDraws(int(file["in::flipped"]))]
    check(file, "in::data", batch.images, 1e-6)
    feed_proposals(file, monkeypatch)
    feed_anchor_labels(file, monkeypatch)
    output = network(batch)
    found = {name: value.item() for name, value in {**output.losses, **output.metrics}.items()}
    assert found == pytest.approx({name: meta["losses"][name] for name in found}, rel=1e-4, abs=1e-5)

    weights = loss_weights(load_recipe(f"upsnet_{configuration}"))
    total = sum(weights[name] * loss for name, loss in output.losses.items())
    assert total.item() == pytest.approx(meta["losses"]["total"], rel=1e-4)
    total.backward()
    norms = {name: float(p.grad.norm()) for name, p in network.named_parameters() if p.grad is not None}
    expected = {our_name(name): norm for name, norm in meta["grad_norms"].items()}
    largest = max(expected.values())
    for name, norm in expected.items():
        assert norms.get(name, 0.0) == pytest.approx(norm, rel=1e-2, abs=1e-5 * largest), name
    assert set(norms) == set(expected)
