"""The shipped recipes hold the numbers of the original's seven experiments."""

import pytest

from upsnet.config import load_recipe
from upsnet.config.load import EXPERIMENTS
from upsnet.config.paths import default_weights

COCO = {
    "output_path": "./output/upsnet/coco",
    "dataset.dataset": "coco",
    "dataset.dataset_path": "./data/coco/",
    "dataset.image_set": "train2017",
    "dataset.test_image_set": "val2017",
    "dataset.num_classes": 81,
    "dataset.num_seg_classes": 133,
    "network.fpn_with_gap": True,
    "network.backbone_with_dconv": 100,
    "network.fcn_num_layers": 3,
    "train.scales": (800,),
    "train.max_size": 1333,
    "test.scales": (800,),
    "test.max_size": 1333,
    "train.warmup_iteration": 1500,
    "train.snapshot_step": 2000,
    "train.fcn_loss_weight": 0.2,
    "train.fcn_with_roi_loss": True,
    "train.panoptic_loss_weight": 0.1,
    "test.panoptic_stuff_area_limit": 4096,
}
CITYSCAPES = {
    "output_path": "./output/upsnet/cityscapes",
    "dataset.dataset": "Cityscapes",
    "dataset.dataset_path": "./data/cityscapes/",
    "dataset.image_set": "train",
    "dataset.test_image_set": "val",
    "dataset.num_classes": 9,
    "dataset.num_seg_classes": 19,
    "network.fpn_with_gap": False,
    "network.backbone_with_dconv": 100,
    "network.fcn_num_layers": 2,
    "train.scales": (800, 832, 864, 896, 928, 960, 992, 1024),
    "train.max_size": 2048,
    "test.scales": (1024,),
    "test.max_size": 2048,
    "train.warmup_iteration": 1500,
    "train.snapshot_step": 1000,
    "train.fcn_loss_weight": 1,
    "train.fcn_with_roi_loss": False,
    "train.panoptic_loss_weight": 0.5,
    "test.panoptic_stuff_area_limit": 2048,
}
COMMON = {
    "system": "upsnet",
    "network.has_rpn": True,
    "network.has_rcnn": True,
    "network.has_mask_head": True,
    "network.has_fcn_head": True,
    "network.has_panoptic_head": True,
    "network.use_caffe_model": True,
    "network.backbone_fix_bn": True,
    "network.backbone_freeze_at": 2,
    "network.backbone_stride_in_1x1": True,
    "train.compat": "original",
    "train.optimizer": "sgd",
    "train.lr_schedule": "step",
    "train.precision": "fp32",
    "train.display_iter": 20,
    "train.resume": False,
    "train.begin_iteration": 0,
    "train.wd": 1e-4,
    "train.momentum": 0.9,
    "train.batch_size": 1,
    "test.batch_size": 1,
    "train.panoptic_box_keep_fraction": 0.7,
    "train.eval_data": True,
    "test.vis_mask": False,
}
RESNET50 = "./model/pretrained_model/resnet-50-caffe.pth"


def experiment(data, depth, prefix, gpus, horovod, pretrained, total_batch, lr, steps, decay, **changed):
    return {
        **COMMON,
        **data,
        "symbol": f"resnet_{depth}_upsnet",
        "model_prefix": f"upsnet_resnet_{prefix}_",
        "gpus": gpus,
        "train.use_horovod": horovod,
        "network.pretrained": pretrained,
        "train.total_batch": total_batch,
        "train.lr": lr,
        "train.max_iteration": steps,
        "train.decay_iteration": decay,
        **{key.replace("__", "."): value for key, value in changed.items()},
    }


EXPECTED = {
    "upsnet_resnet50_coco_16gpu": experiment(COCO, 50, "50_coco", "0", True, RESNET50, 16, 0.02, 90000, (60000, 80000)),
    "upsnet_resnet50_coco_8gpu": experiment(
        COCO, 50, "50_coco", "0,1,2,3,4,5,6,7", False, RESNET50, 8, 0.01, 180000, (120000, 160000)
    ),
    "upsnet_resnet50_coco_4gpu": experiment(
        COCO, 50, "50_coco", "0,1,2,3", False, RESNET50, 4, 0.005, 360000, (240000, 320000)
    ),
    "upsnet_resnet101_dcn_coco_3x_16gpu": experiment(
        COCO,
        101,
        "101_coco",
        "0",
        True,
        "./model/pretrained_model/resnet-101-caffe.pth",
        16,
        0.02,
        270000,
        (210000, 250000),
        network__backbone_with_dconv=3,
        train__scales=(640, 672, 704, 736, 768, 800, 832),
    ),
    "upsnet_resnet50_cityscapes_16gpu": experiment(
        CITYSCAPES, 50, "50_cityscapes", "0", True, RESNET50, 16, 0.02, 12000, (9000,)
    ),
    "upsnet_resnet50_cityscapes_4gpu": experiment(
        CITYSCAPES, 50, "50_cityscapes", "0,1,2,3", False, RESNET50, 4, 0.005, 48000, (36000,)
    ),
    "upsnet_resnet101_cityscapes_w_coco_16gpu": experiment(
        CITYSCAPES,
        101,
        "101_cityscapes",
        "0",
        True,
        "./model/upsnet_resnet_101_coco_pretrained_for_cityscapes.pth",
        16,
        0.02,
        3000,
        (2000,),
        train__warmup_iteration=0,
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_numbers_of_the_seven_experiments(name):
    recipe = load_recipe(name)
    found = {}
    for key in EXPECTED[name]:
        value = recipe
        for part in key.split("."):
            value = getattr(value, part)
        found[key] = value
    assert found == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_the_snapshot_of_the_last_step_is_tested(name):
    steps, prefix = EXPECTED[name]["train.max_iteration"], EXPECTED[name]["model_prefix"]
    assert default_weights(load_recipe(name)).name == f"{prefix}{steps}.pth"


def test_every_shipped_recipe_loads_without_a_warning(caplog):
    names = {path.stem for path in EXPERIMENTS.glob("[!_]*.yaml")}
    assert names == {*EXPECTED, "upsnet_resnet50_panoptic", "upsnet_resnet18_shapes"}
    for name in names:
        assert load_recipe(name).name == name
    assert not caplog.records


def test_recipes_of_our_own_train_with_the_oddities_mended():
    for name in ("upsnet_resnet50_panoptic", "upsnet_resnet18_shapes"):
        recipe = load_recipe(name)
        assert recipe.train.compat is None
        assert recipe.dataset.dataset == "panoptic"
        assert recipe.dataset.num_classes is None and recipe.dataset.num_seg_classes is None


def test_the_demo_learns_from_scratch():
    network = load_recipe("upsnet_resnet18_shapes").network
    assert network.pretrained is None
    assert not network.backbone_fix_bn or network.backbone_with_norm == "group_norm"
    assert network.backbone_freeze_at == 0
