"""What the keys of a recipe do to the things that are built from it."""

from functools import cache, reduce

import pytest
import torch
from torch import nn

from tests.config.test_recipes import EXPECTED
from tests.miniature import write_miniature
from upsnet import builders
from upsnet.config import load_recipe
from upsnet.models.dense import CompiledDense
from upsnet.models.layers import DeformConv2d, FrozenBatchNorm2d
from upsnet.structures.categories import Categories, Category
from upsnet.structures.class_tables import class_table
from upsnet.structures.errors import RecipeError

THINGS = [Category(i, f"thing {i}", True, (i, 0, 0)) for i in range(1, 4)]
STUFF = [Category(i, f"stuff {i}", False, (i, 0, 0)) for i in range(4, 6)]
CATEGORIES = Categories(THINGS + STUFF)
SMALL = ["network.fpn_feature_dim=32", "network.fcn_feature_dim=32", "network.rcnn_feature_dim=32",
         "network.mask_feature_dim=32", "dataset.num_workers=0"]  # fmt: skip


def recipe_with(*overrides, recipe="upsnet_resnet18_shapes"):
    return load_recipe(recipe, [*SMALL, *overrides])


@cache
def built(*overrides):
    """The network without memory for its weights."""
    with torch.device("meta"):
        return builders.build_network(recipe_with(*overrides), CATEGORIES)


def at(thing, path):
    """`at(network, "rpn.ratios")`; numbers index."""
    return reduce(lambda x, name: x[int(name)] if name.isdecimal() else getattr(x, name), path.split("."), thing)


@pytest.mark.parametrize(
    "override, path, value",
    [
        ("network.backbone_checkpointing=true", "backbone.checkpointing", True),
        ("train.rpn_batch_size=17", "sampling.anchors.batch_size", 17),
        ("train.rpn_fg_fraction=0.21", "sampling.anchors.positive_fraction", 0.21),
        ("train.rpn_positive_overlap=0.81", "sampling.anchors.positive_overlap", 0.81),
        ("train.rpn_negative_overlap=0.22", "sampling.anchors.negative_overlap", 0.22),
        ("train.rpn_straddle_thresh=-1", "sampling.anchors.straddle", -1),
        ("train.rpn_nms_thresh=0.61", "sampling.proposals.nms_threshold", 0.61),
        ("train.rpn_pre_nms_top_n=71", "sampling.proposals.pre_nms", 71),
        ("train.rpn_post_nms_top_n=72", "sampling.proposals.post_nms", 72),
        ("train.rpn_min_size=3.5", "sampling.proposals.min_size", 3.5),
        ("train.batch_rois=33", "sampling.rois.batch_size", 33),
        ("train.fg_fraction=0.31", "sampling.rois.foreground_fraction", 0.31),
        ("train.fg_thresh=0.63", "sampling.rois.foreground_overlap", 0.63),
        ("train.bg_thresh_hi=0.41", "sampling.rois.background_high", 0.41),
        ("train.bg_thresh_lo=0.11", "sampling.rois.background_low", 0.11),
        ("network.bbox_reg_weights=[1, 2, 3, 4]", "sampling.rois.box_weights", (1, 2, 3, 4)),
        ("network.bbox_reg_weights=[1, 2, 3, 4]", "selection.detections.box_weights", (1, 2, 3, 4)),
        ("train.panoptic_box_keep_fraction=0.9", "sampling.keep_fraction", 0.9),
        ("train.fcn_with_roi_loss=true", "sampling.with_roi_loss", True),
        ("train.compat=original", "sampling.anchors.as_original", True),
        ("train.compat=original", "sampling.rois.as_original", True),
        ("train.crowd_filter_thresh=0.6", "sampling.anchors.crowd_overlap", 0.6),
        ("train.crowd_filter_thresh=0.6", "sampling.rois.crowd_overlap", 0.6),
        ("test.rpn_nms_thresh=0.62", "selection.proposals.nms_threshold", 0.62),
        ("test.rpn_pre_nms_top_n=73", "selection.proposals.pre_nms", 73),
        ("test.rpn_post_nms_top_n=74", "selection.proposals.post_nms", 74),
        ("test.rpn_min_size=4.5", "selection.proposals.min_size", 4.5),
        ("test.score_thresh=0.07", "selection.detections.score_threshold", 0.07),
        ("test.nms_thresh=0.47", "selection.detections.nms_threshold", 0.47),
        ("test.max_det=19", "selection.detections.max_detections", 19),
        ("test.panoptic_score_thresh=0.67", "selection.panoptic_score_threshold", 0.67),
        ("test.panoptic_stuff_area_limit=99", "selection.stuff_area_limit", 99),
        ("network.fpn_feature_dim=64", "fpn.channels", 64),
        ("network.fpn_upsample_method=bilinear", "fpn.upsample", "bilinear"),
        ("network.fpn_with_gap=false", "fpn.global_average", None),
        ("network.anchor_ratios=[0.5, 1]", "rpn.objectness.out_channels", 2),
        ("network.anchor_scales=[4, 8]", "rpn.objectness.out_channels", 6),
        ("network.rcnn_feature_dim=64", "box_head.fc7.out_features", 64),
        ("network.mask_feature_dim=64", "mask_head.deconv.out_channels", 64),
        ("network.mask_size=14", "mask_head.pooled_size", 7),
        ("network.fcn_feature_dim=64", "semantic_head.width", 64),
        ("network.backbone_freeze_at=3", "backbone.freeze_at", 3),
    ],
)
def test_a_key_reaches_its_place(override, path, value):
    network, default = built(override), built()
    assert at(network, path) == value != at(default, path)


@pytest.mark.parametrize(
    "override, part, kind, absent",
    [
        ("network.fpn_with_norm=group_norm", "fpn", nn.GroupNorm, True),
        ("network.rcnn_with_norm=group_norm", "mask_head", nn.GroupNorm, True),
        ("network.rcnn_with_norm=group_norm", "box_head", nn.GroupNorm, True),
        ("network.fcn_with_norm=batch_norm", "semantic_head", nn.BatchNorm2d, True),
        ("network.backbone_with_norm=group_norm", "backbone", nn.GroupNorm, True),
        ("network.backbone_fix_bn=true", "backbone", FrozenBatchNorm2d, True),
        ("network.backbone_with_dconv=5", "backbone.res5.0", DeformConv2d, True),
        ("network.backbone_with_dconv=5", "backbone.res4", DeformConv2d, False),
        ("network.backbone_with_dpyramid=true", "backbone.res4.1", DeformConv2d, True),
    ],
)
def test_a_key_adds_a_layer(override, part, kind, absent):
    def layers(network):
        return [m for m in at(network, part).modules() if isinstance(m, kind)]

    assert bool(layers(built(override))) == absent and not layers(built())


def test_depth_and_stride():
    assert len(built("symbol=resnet_34_upsnet").backbone.res4) == 6
    deep = built("symbol=resnet_50_upsnet", "network.backbone_stride_in_1x1=false").backbone
    assert (deep.res3[0].conv1.stride, deep.res3[0].conv2.stride) == ((1, 1), (2, 2))
    assert built("symbol=resnet_50_upsnet").backbone.res3[0].conv1.stride == (2, 2)
    assert len(built("network.fcn_num_layers=3").semantic_head.layers) == 3


def test_the_heads_fit_the_classes():
    network = built()
    assert network.num_stuff == 2
    assert network.box_head.class_logits.out_features == network.mask_head.score.out_channels == 4
    assert network.semantic_head.score.out_channels == 5
    with pytest.raises(RecipeError, match="isthing"):
        builders.build_network(recipe_with(), Categories(STUFF))


def test_weights_follow_the_seed_and_leave_other_draws_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, second, other = (builders.build_network(recipe_with(f"seed={seed}"), CATEGORIES) for seed in (3, 3, 4))
    assert torch.equal(torch.rand(1), expected)
    name = "box_head.fc6.weight"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_losses_of_the_coco_recipe():
    """Facts of the original: a fifth for the semantic loss, a fifth of that in boxes, a tenth for the panoptic one."""
    weights = builders.loss_weights(load_recipe("upsnet_resnet50_coco_16gpu"))
    assert weights == pytest.approx(
        {
            "rpn_cls_loss": 1, "rpn_bbox_loss": 1, "cls_loss": 1, "bbox_loss": 1, "mask_loss": 1, "fcn_loss": 0.2,
            "fcn_roi_loss": 0.04, "panoptic_loss": 0.1,
        }
    )  # fmt: skip
    changed = builders.loss_weights(
        recipe_with("train.bbox_loss_weight=3", "train.fcn_loss_weight=0.7", "train.panoptic_loss_weight=0")
    )
    assert (changed["bbox_loss"], changed["fcn_loss"], changed["panoptic_loss"]) == (3, 0.7, 0)
    assert "fcn_roi_loss" not in changed


def test_the_coco_recipe_makes_the_network_of_the_paper():
    with torch.device("meta"):
        network = builders.build_network(load_recipe("upsnet_resnet50_coco_16gpu"), class_table("coco"))
    assert network.backbone.freeze_at == 2 and network.fpn.global_average is not None
    assert (network.box_head.class_logits.out_features, network.semantic_head.score.out_channels) == (81, 133)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == 46


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_form_in_which_a_network_is_tested(precision, dtype):
    recipe = recipe_with(f"test.precision={precision}")
    network = builders.build_network(recipe, CATEGORIES)
    prepared = builders.prepare_for_test(recipe, network)
    assert not prepared.training and not any(isinstance(m, nn.BatchNorm2d) for m in prepared.modules())
    assert prepared.rpn.conv.weight.dtype == dtype and "features" not in vars(prepared)


def test_the_dense_part_is_compiled_or_recorded_on_request(caplog):
    recipe = recipe_with("test.compile=true", "test.cuda_graph=true")
    prepared = builders.prepare_for_test(recipe, builders.build_network(recipe, CATEGORIES))
    assert isinstance(vars(prepared)["features"], CompiledDense)
    assert [r.getMessage()[:16] for r in caplog.records] == ["test.cuda_graph:"]


def test_options_of_the_training_loop():
    recipe = recipe_with(
        "train.optimizer=sgd", "train.lr=0.3", "train.lr_schedule=step", "train.decay_iteration=[7, 9]",
        "train.warmup_iteration=5", "train.max_iteration=11", "train.batch_size=2", "train.total_batch=6",
        "train.precision=bf16", "train.clip_gradient=10", "train.ema=0.99", "seed=12",
        "train.display_iter=13", "train.snapshot_step=14",
    )  # fmt: skip
    options = builders.engine_options(recipe, epoch_length=20)
    assert (options.lr, options.lr_schedule, options.decay_iterations, options.warmup_iterations) == (
        0.3, "step", (7, 9), 5,
    )  # fmt: skip
    assert (options.max_iteration, options.accumulation, options.steps_per_epoch) == (11, 3, 4)
    assert (options.clip_gradient, options.ema) == (10, 0.99)
    assert (options.precision, options.seed, options.display_iter, options.snapshot_step) == ("bf16", 12, 13, 14)
    assert builders.engine_options(recipe, epoch_length=3).steps_per_epoch == 1
    assert builders.accumulation(recipe, workers=3) == 1
    with pytest.raises(RecipeError, match=r"train\.total_batch \(6\)"):
        builders.accumulation(recipe, workers=2)


def test_the_optimiser_of_the_recipe():
    recipe = recipe_with("train.optimizer=sgd", "train.momentum=0.7", "train.wd=0.03")
    optimizer = builders.build_optimizer_of(recipe, builders.build_network(recipe, CATEGORIES))
    weights = next(group for group in optimizer.param_groups if group["kind"] == "weight")
    assert (weights["momentum"], weights["weight_decay"]) == (0.7, 0.03)
    adamw = recipe_with("train.optimizer=adamw")
    built_adamw = builders.build_optimizer_of(adamw, builders.build_network(adamw, CATEGORIES))
    assert type(built_adamw).__name__ == "AdamW"


@pytest.fixture
def data(tmp_path):
    write_miniature(tmp_path, "train", instances=True)
    write_miniature(tmp_path, "val", images=4, seed=1)
    return f"dataset.dataset_path={tmp_path}"


def test_the_training_set(data):
    assert len(builders.build_training_set(recipe_with(data))) == 12
    assert len(builders.build_training_set(recipe_with(data, "train.flip=false"))) == 6
    original = builders.build_training_set(recipe_with(data, "train.compat=original"))
    assert original.num_photos == 5 and 24 not in original.image_ids, "image 24 shows no things"
    things = [
        len(builders.build_training_set(recipe_with(data, f"train.gt_min_area={area}"))[0].targets.instances)
        for area in (-1, 480)
    ]
    assert things == [2, 1]
    sample = builders.build_training_set(recipe_with(data, "train.scales=[60]", "train.max_size=70"))[0]
    assert max(sample.size) == 70


def test_the_test_set(data):
    recipe = recipe_with(data, "test.scales=[24]", "network.use_caffe_model=false", "dataset.num_seg_classes=5")
    dataset = builders.build_test_set(recipe)
    assert dataset.num_photos == len(dataset) == 4 and dataset[0].targets is None
    assert dataset[0].size == (24, 32) and dataset[0].image.abs().max() < 5
    assert builders.build_test_set(recipe, targets=True)[0].targets is not None
    means = builders.build_test_set(recipe_with(data, "network.pixel_means=[0, 0, 0]"))[0].image
    assert means.min() >= 0 and means.max() > 100
    loader = builders.build_test_loader(recipe_with(data, "test.batch_size=3"), dataset)
    assert sorted(i for batch in loader for i in batch.image_ids) == dataset.image_ids.tolist()
    assert max(len(batch) for batch in loader) == 3


@pytest.mark.parametrize("name", EXPECTED)
def test_a_released_file_is_tested_at_the_test_scale(name):
    """Whatever scales training draws; the original drew from them in testing too."""
    recipe = load_recipe(name)
    (transform,) = builders.test_views(recipe).transforms
    short, long, sizes = (1024, 2048, [(1024, 2048)]) if "cityscapes" in name else (800, 1333, [(480, 640), (640, 480)])
    assert (tuple(transform.scales), transform.max_size) == ((short,), long)
    for size in sizes:
        scales = {transform.scale(*size, image_id=i, step=i) for i in range(20)}
        assert scales == {short / min(size)}


def test_batches_of_the_training(data):
    recipe = recipe_with(data, "train.batch_size=2", "train.total_batch=4", "train.max_iteration=3")
    dataset = builders.build_training_set(recipe)
    whole = [batch.image_ids for batch in builders.build_training_loader(recipe, dataset, 0)]
    assert len(whole) == 6 and all(len(ids) == 2 for ids in whole)
    assert [batch.image_ids for batch in builders.build_training_loader(recipe, dataset, 2)] == whole[4:]


def test_layouts_that_are_not_read_yet():
    with pytest.raises(RecipeError, match=r"'ade20k' cannot be read.*dataset\.dataset=panoptic"):
        builders.build_test_set(recipe_with("dataset.dataset=ade20k"))


def test_the_device(monkeypatch):
    recipe = recipe_with("gpus='1,0'")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert builders.choose_device(recipe) == torch.device("cpu") and "CPU" in builders.device_name(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert builders.choose_device(recipe) == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RecipeError, match="device 1 is not there"):
        builders.choose_device(recipe)
    assert builders.choose_device(recipe, torch.device("cuda")) == torch.device("cuda")
    for wanted in ("cpu", "meta"):
        assert builders.choose_device(recipe, torch.device(wanted)) == torch.device(wanted)
    with pytest.raises(RecipeError, match="cuda:1 is not there, this machine has 1"):
        builders.choose_device(recipe, torch.device("cuda:1"))


def test_norms_over_all_workers_where_the_recipe_and_the_device_have_them(caplog):
    class Workers:
        def __init__(self, count, batch_norm):
            self.count, self.batch_norm = count, batch_norm

    def kinds(workers, *changes):
        recipe = recipe_with("network.backbone_fix_bn=false", "network.rcnn_with_norm=batch_norm", *changes)
        network = builders.build_network(recipe, CATEGORIES)
        builders.share_norms_of(recipe, network, workers)
        return {type(m) for m in network.modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)}

    on_gpus, alone = Workers(2, nn.SyncBatchNorm), Workers(1, None)
    assert kinds(on_gpus) == kinds(alone, "network.use_syncbn=true") == {nn.BatchNorm2d}
    assert kinds(on_gpus, "network.use_syncbn=true") == {nn.SyncBatchNorm}
    assert not caplog.records
    assert kinds(Workers(2, None), "network.use_syncbn=true") == {nn.BatchNorm2d}
    assert [record.getMessage()[:19] for record in caplog.records] == ["network.use_syncbn:"]
