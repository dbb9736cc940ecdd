"""The whole network gives the original's numbers (`oracle_fixtures/forward_*.npz`, `losses_*.npz`)."""

import json
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.fixtures import NumpyAnchorDraws, NumpyDraws, street_picture
from tests.models.test_checkpoint_keys import categories_of
from upsnet.builders import build_network, loss_weights
from upsnet.checkpoints.released import our_name
from upsnet.config import load_recipe
from upsnet.dataset.batches import collate
from upsnet.dataset.transforms import Transform, network_scale, quarter_masks, resize_labels
from upsnet.models.boxes import clip, decode
from upsnet.models.matching import match_anchors
from upsnet.models.panoptic_head import fuse
from upsnet.models.rpn import Proposals, propose
from upsnet.structures.masks import Masks, mask_from_coco
from upsnet.structures.sample import VOID, Instances, Sample, Targets

SAME_PIXELS = 0.9999  # rounding decides ties
ROI_TOLERANCE = 1e-2  # pixels
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


def feed_proposals(file, monkeypatch, missed=0.0):
    """Ours must be the recorded proposals. Then takes the recorded ones, for the draws count in their order.

    missed: share that may be others (where thousands of boxes are kept, some overlap by the threshold itself).
    """
    rois, scores = torch.from_numpy(file["mid::rois"][:, 1:]), torch.from_numpy(file["mid::roi_scores"])

    def recorded(output, sizes, scales, options):
        found = propose(ties_as_recorded(output, sizes[0], rois), sizes, scales, options)
        (boxes,), our_scores = found.trimmed(), found.scores[0]
        assert abs(len(boxes) - len(rois)) <= missed * len(rois)
        count = min(len(boxes), len(rois))
        assert (our_scores[:count] - scores[:count]).abs().max() < 1e-4
        assert (distances(boxes, rois).amin(dim=0) >= ROI_TOLERANCE).float().mean() <= missed
        return Proposals(rois[None], scores[None], torch.ones(1, len(rois), dtype=torch.bool))

    monkeypatch.setattr("upsnet.models.upsnet.propose", recorded)


def ties_as_recorded(output, size, rois):
    """The original ranks sigmoids, and its order of equal ones is arbitrary (in the network with deformable stages
    hundreds are exactly 1): among scores that rounding makes equal, anchors of recorded boxes come first."""
    logits = []
    for level, deltas, anchors in zip(*output.of_image(0), output.anchors, strict=True):
        chosen = distances(clip(decode(anchors, deltas), size), rois).amin(dim=1) < ROI_TOLERANCE
        _, group = (level.sigmoid().double() * 1e6).round().unique(return_inverse=True)
        highest = level.new_full((int(group.max()) + 1,), -torch.inf).scatter_reduce(0, group, level, "amax")[group]
        level = torch.where(chosen, highest.nextafter(torch.tensor(torch.inf)), highest)
        count, height, width = output.logits[len(logits)].shape[1:]
        logits.append(level.reshape(1, height, width, count).permute(0, 3, 1, 2))
    return replace(output, logits=logits)


def distances(boxes, others):
    """Of each box to each other one: the greatest difference of a coordinate, in pixels."""
    return torch.cdist(boxes.detach(), others, p=float("inf"))


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
    fused = spy_on_fusion(monkeypatch)
    (prediction,) = network(batch)
    check_kept(file, *fused[0])
    check_fused(file, fused[0][1], network.num_stuff)
    check_detections(file, prediction)
    check_maps(file, prediction)


def spy_on_fusion(monkeypatch):
    """What `fuse` is given as candidates, and what it makes of them."""
    seen = []

    def fuse_and_tell(scores, size, candidates, *given):
        seen.append((candidates, fuse(scores, size, candidates, *given)))
        return seen[-1][1]

    monkeypatch.setattr("upsnet.models.upsnet.fuse", fuse_and_tell)
    return seen


def check_kept(file, candidates, fused):
    """The same boxes may become instances and the same ones do: matched by class and place, as scores are tied."""
    for ours, rows in ((candidates, slice(None)), (fused.instances, file["mid::removal_keep_inds"])):
        boxes, classes = torch.from_numpy(file["mid::pano_rois"][rows, 1:]), file["mid::pano_cls_idx"][rows]
        scores = torch.from_numpy(file["mid::pano_scores"][rows])
        assert ours.scores.tolist() == sorted(ours.scores.tolist(), reverse=True)
        assert len(ours) == len(boxes) and (ours.scores - scores).abs().max() < 1e-4
        near = distances(ours.boxes, boxes) < ROI_TOLERANCE
        same = (
            near & (ours.classes[:, None] == torch.from_numpy(classes)) & ((ours.scores[:, None] - scores).abs() < 1e-4)
        )
        assert same.any(dim=0).all() and same.any(dim=1).all()
    assert sorted(fused.instances.classes.tolist()) == sorted(file["out::panoptic_cls_inds"].tolist())


def check_fused(file, fused, num_stuff):
    """At network size: semantic classes, stuff and void, and instances one to one."""
    assert (fused.semantic.numpy() != file["out::fcn_outputs"][0]).sum() <= 1  # rounding decides a tie
    ours, theirs = fused.channels.numpy(), file["out::panoptic_outputs"][0].astype(np.int64)
    theirs = np.where(theirs == 255, VOID, theirs)
    assert_same_pixels(ours.clip(max=num_stuff), theirs.clip(max=num_stuff))
    assert_one_to_one(ours, theirs)


def assert_same_pixels(ours, theirs):
    assert (ours == theirs).mean() >= SAME_PIXELS


def assert_one_to_one(first, second):
    """Two maps have the same regions, whatever the regions are called."""
    pairs, counts = np.unique(np.stack([first.ravel(), second.ravel()], axis=1), axis=0, return_counts=True)
    names = {}
    for (ours, theirs), _ in sorted(zip(pairs.tolist(), counts, strict=True), key=lambda pair: -pair[1]):
        if theirs not in names and ours not in names.values():
            names[theirs] = ours
    assert_same_pixels(first, np.vectorize(names.get, otypes=[np.int64])(second, np.iinfo(np.int64).min))


def check_detections(file, prediction):
    found = prediction.instances
    expected = file["post::detections_cls_x1y1x2y2_score"]
    order = np.lexsort((-found.scores, found.classes))
    theirs = expected[np.lexsort((-expected[:, 5], expected[:, 0]))]
    assert found.classes[order].tolist() == theirs[:, 0].tolist()
    assert np.abs(found.boxes[order] - theirs[:, 1:5]).max() < ROI_TOLERANCE
    assert np.abs(found.scores[order] - theirs[:, 5]).max() < 1e-4
    assert found.masks == json.loads(str(file["post::rle_json"]))


def check_maps(file, prediction):
    """On the photo: semantic classes, panoptic classes, and instances one to one."""
    assert (prediction.semantic_map != file["post::sseg"]).sum() <= 1  # rounding decides a tie
    pan = file["post::pan_2ch"].astype(np.int64)
    ours = np.zeros(pan.shape[:2], dtype=np.int64)
    for segment in prediction.segments:
        ours[prediction.segment_map == segment.id] = segment.semantic_id + 1
    assert_same_pixels(ours, np.where(pan[..., 0] == 255, 0, pan[..., 0] + 1))
    assert_one_to_one(prediction.segment_map, pan[..., 0] * 256 + pan[..., 1])


def seed_anchors(file, monkeypatch):
    """The original draws anchors in its data loader, from a generator of the same seed; ours must be the same."""

    def seeded(anchors, truth, crowds, size, options, draws):
        labels, targets = match_anchors(
            anchors, truth, crowds, size, options, NumpyAnchorDraws(int(file["in::flipped"]))
        )
        expected, offsets = [], []
        height, width = file["mid::rpn_cls_score"].shape[2:]
        for i, stride in enumerate((4, 8, 16, 32, 64)):
            h, w = -(-height // 2**i), -(-width // 2**i)
            expected.append(file[f"in::rpn_labels_fpn{stride}"][0, :, :h, :w].transpose(1, 2, 0).reshape(-1))
            level = file[f"in::rpn_bbox_targets_fpn{stride}"][0, :, :h, :w]
            offsets.append(level.reshape(3, 4, h, w).transpose(2, 3, 0, 1).reshape(-1, 4))
        assert labels.tolist() == np.concatenate(expected).tolist()
        positive = labels == 1
        assert np.abs(targets[positive].numpy() - np.concatenate(offsets)[positive.numpy()]).max() < 1e-5
        return labels, targets

    monkeypatch.setattr("upsnet.models.rpn.match_anchors", seeded)


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


def training_step(file, network, configuration, monkeypatch, noise=None):
    """Losses, metrics, their weighted total and the norm of each gradient. noise: number of a shaken input."""
    network.zero_grad()
    batch = collate([training_sample(file)])
    batch.draws = [NumpyDraws(int(file["in::flipped"]))]
    check(file, "in::data", batch.images, 1e-6)
    if noise is not None:
        shake = torch.randn(batch.images.shape, generator=torch.Generator().manual_seed(noise))
        batch.images = batch.images * (1 + 1e-6 * shake)
    with monkeypatch.context() as patches:
        feed_proposals(file, patches, missed=0.002)
        seed_anchors(file, patches)
        output = network(batch)
    weights = loss_weights(load_recipe(f"upsnet_{configuration}"))
    total = sum(weights[name] * loss for name, loss in output.losses.items())
    total.backward()
    numbers = {name: value.item() for name, value in {**output.losses, **output.metrics, "total": total}.items()}
    return numbers, {name: float(p.grad.norm()) for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["losses", "losses_flipped"])
@pytest.mark.parametrize("configuration", ["resnet50_coco_16gpu", "resnet50_cityscapes_16gpu", LARGE])
def test_losses_and_gradients(configuration, kind, shared, monkeypatch):
    file = with_picture(load(shared(f"reference/oracle_fixtures/{kind}_{configuration}.npz")))
    meta = json.loads(str(file["meta_json"]))
    network = network_of(configuration, file, shared).train()
    numbers, norms = training_step(file, network, configuration, monkeypatch)
    assert set(numbers) == set(meta["losses"])
    assert numbers == pytest.approx(meta["losses"], rel=1e-4, abs=1e-6)
    expected = {our_name(name): norm for name, norm in meta["grad_norms"].items()}
    assert set(norms) == set(expected)

    def furthest(norms):
        return max(abs(norms[name] / norm - 1) for name, norm in expected.items())

    # Gradients of the deformable stages jump where a sample crosses a pixel's border: a change of the input by 1e-6 of
    # itself, as rounding makes it, moves some norms by 3e-3. So inputs so close to the recorded one count as well.
    attempts = iter(range(15 if configuration == LARGE.values[0] else 0))
    while furthest(norms) > 1e-3:
        noise = next(attempts, None)
        assert noise is not None, f"a gradient differs by {furthest(norms):.1e}"
        _, norms = training_step(file, network, configuration, monkeypatch, noise)


def with_picture(file):
    """The Cityscapes files hold a digest of their picture: the picture made again, with every recorded value right."""
    if "in::image_bgr" in file:
        return file
    picture = street_picture(file["in::label_png"])
    assert tuple(file["shape::in::image_bgr"]) == picture.shape
    assert np.array_equal(picture.ravel()[file["pos::in::image_bgr"]], file["val::in::image_bgr"])
    _, total, _, deviation, lowest, highest = file["stat::in::image_bgr"]
    assert abs(int(picture.sum(dtype=np.int64)) - total) <= 5  # 0 where this was written; a blur may round otherwise
    assert picture.std(dtype=np.float64) == pytest.approx(deviation, rel=1e-6)
    assert (picture.min(), picture.max()) == (lowest, highest)
    return {**file, "in::image_bgr": picture}


@pytest.mark.parametrize("kind", ["losses", "losses_flipped"])
def test_the_street_picture_is_the_recorded_one(kind, shared):
    """The quarter-size input, which the original makes and never uses, is stored whole: it sees every part."""
    file = with_picture(load(shared(f"reference/oracle_fixtures/{kind}_resnet50_cityscapes_16gpu.npz")))
    image = training_sample(file).image.permute(1, 2, 0).numpy()
    quarter = cv2.resize(image, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_LINEAR).transpose(2, 0, 1)
    assert quarter.shape == file["in::data_4x"].shape[1:]
    assert np.abs(quarter - file["in::data_4x"][0]).max() < 1e-4
