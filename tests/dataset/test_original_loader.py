"""The original's data loader: the same sample from the same files (`losses_*.npz`)."""

import json

import cv2
import numpy as np
import pytest
import torch

from tests.fixtures import street_picture
from tests.miniature import write_json
from upsnet.dataset.batches import collate
from upsnet.dataset.coco_panoptic import CocoPanoptic
from upsnet.dataset.image_sets import ImageSet
from upsnet.dataset.transforms import Transform
from upsnet.structures.panoptic_png import id_to_rgb
from upsnet.structures.sample import VOID

COCO = ("resnet50_coco_16gpu", "resnet101_dcn_coco_3x_16gpu")
CITYSCAPES = "resnet50_cityscapes_16gpu"
FILES = [f"{kind}_{name}" for kind in ("losses", "losses_flipped") for name in (*COCO, CITYSCAPES)]


@pytest.fixture(params=FILES)
def original(request, shared):
    path = shared(f"reference/oracle_fixtures/{request.param}.npz")
    with np.load(path, allow_pickle=False) as file:
        given = {key: file[key] for key in file.files if "in::" in key}
    return request.param, given


def write_data_set(folder, given, num_stuff):
    """The files behind a fixture, with the semantic label as panoptic PNG: one segment a class, id = class + 1."""
    instances = json.loads(str(given["in::instances_json"]))
    label = given["in::label_png"].astype(np.int32)
    (image,) = instances["images"]
    # Stuff first in the network's order, yet last in the file, as in COCO.
    things = [{**category, "isthing": 1} for category in instances["categories"]]
    stuff = [{"id": 1000 + i, "name": f"stuff {i}", "isthing": 0} for i in range(num_stuff)]
    category_of = [*(c["id"] for c in stuff), *(c["id"] for c in things)]
    classes = [int(c) for c in np.unique(label) if c != 255]
    segments = [{"id": c + 1, "category_id": category_of[c], "iscrowd": 0} for c in classes]
    image["file_name"] = "photo.png"
    annotation = {"image_id": image["id"], "file_name": "label.png", "segments_info": segments}
    write_json(folder / "panoptic.json", {"images": [image], "annotations": [annotation], "categories": things + stuff})
    write_json(folder / "instances.json", instances)
    photo = given.get("in::image_bgr")
    photo = street_picture(given["in::label_png"]) if photo is None else photo
    cv2.imwrite(str(folder / "photo.png"), photo)
    cv2.imwrite(str(folder / "label.png"), id_to_rgb(np.where(label == 255, 0, label + 1))[..., ::-1])
    return ImageSet(folder / "panoptic.json", folder, folder, folder / "instances.json")


def test_the_same_sample(tmp_path, original):
    name, given = original
    cityscapes = name.endswith(CITYSCAPES)
    data_set = CocoPanoptic(
        write_data_set(tmp_path, given, 11 if cityscapes else 53),
        Transform((160,), 320),
        flip_copies=True,
    )
    batch = collate([data_set[int(given["in::flipped"])]])
    height, width, scale = given["in::im_info"][0]
    assert batch.sizes == [(height, width)] and batch.scales[0] == pytest.approx(float(scale), rel=1e-6)
    images = batch.images.numpy()
    assert tuple(given["shape::in::data"]) == images.shape
    np.testing.assert_allclose(images.ravel()[given["pos::in::data"]], given["val::in::data"], rtol=1e-5, atol=1e-4)
    _, total, mean, deviation, lowest, highest = given["stat::in::data"]
    summary = [images.sum(dtype=np.float64), images.mean(), images.std(), images.min(), images.max()]
    np.testing.assert_allclose(summary, [total, mean, deviation, lowest, highest], rtol=1e-5)
    check_labels(batch, given)
    check_instances(batch.instances[0], given)
    quarter = torch.from_numpy(given["in::mask_gt"])
    assert torch.equal(batch.quarter_masks[0], quarter == 1) and set(quarter.unique().tolist()) <= {0, 1, 255}


def check_labels(batch, given):
    semantic = batch.semantic.numpy()
    assert (np.where(semantic == VOID, 255, semantic) == given["in::seg_gt"]).all()
    height, width = batch.sizes[0]
    quarter = np.full(given["in::seg_gt_4x"].shape, 255)
    rows, columns = round(height / 4), round(width / 4)
    quarter[0, :rows, :columns] = np.where(semantic == VOID, 255, semantic)[0, ::4, ::4][:rows, :columns]
    assert (quarter == given["in::seg_gt_4x"]).all()


def check_instances(instances, given):
    np.testing.assert_allclose(instances.boxes.numpy(), given["in::roidb_boxes"], atol=1e-4)
    assert instances.classes.tolist() == given["in::roidb_gt_classes"].tolist()
    assert instances.is_crowd.tolist() == given["in::roidb_is_crowd"].tolist()
    assert instances.without_crowd().classes.tolist() == given["in::gt_classes"].tolist()
    segmentations = json.loads(str(given["in::roidb_segms_json"]))
    for mask, segmentation, is_crowd in zip(instances.masks, segmentations, instances.is_crowd, strict=True):
        if not is_crowd:
            for ours, theirs in zip(mask.polygons, segmentation, strict=True):
                np.testing.assert_allclose(ours, theirs)
