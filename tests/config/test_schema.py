from pathlib import Path

import pytest

from upsnet.config import load_recipe
from upsnet.config.original_keys import NO_EFFECT, ONE_VALUE
from upsnet.config.schema import SECTIONS, Recipe, recipe_keys
from upsnet.config.yaml_text import read_yaml, write_yaml
from upsnet.structures.errors import RecipeError

MINIMAL = """
dataset: {dataset_path: data, image_set: train, test_image_set: val}
train: {lr: 0.01, max_iteration: 10}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def recipe_of(text: str) -> Recipe:
    """The recipe of a file `my.yaml`."""
    Path("my.yaml").write_text(text, encoding="utf-8")
    return load_recipe("my.yaml")


def recipe_with(key: str, value: str) -> Recipe:
    """The minimal recipe with one more `section.key`, its value given as yaml."""
    section, _, last = key.rpartition(".")
    tree = read_yaml(MINIMAL, "minimal")
    (tree.setdefault(section, {}) if section else tree)[last] = read_yaml(value, "value")
    return recipe_of(write_yaml(tree))


def test_defaults_are_the_originals():
    recipe = recipe_of(MINIMAL)
    assert recipe.network.pixel_means == (102.9801, 115.9465, 122.7717)
    assert recipe.network.bbox_reg_weights == (10, 10, 5, 5)
    assert recipe.network.anchor_ratios == (0.5, 1, 2)
    assert recipe.network.anchor_scales == (8,)
    assert recipe.network.backbone_freeze_at == 2
    assert recipe.network.backbone_with_dconv == 100
    assert recipe.network.backbone_stride_in_1x1 and recipe.network.backbone_fix_bn
    assert recipe.network.mask_size == 28
    train, test = recipe.train, recipe.test
    assert (train.batch_rois, train.fg_fraction, train.fg_thresh) == (512, 0.25, 0.5)
    assert (train.bg_thresh_hi, train.bg_thresh_lo) == (0.5, 0)
    assert (train.rpn_batch_size, train.rpn_fg_fraction) == (256, 0.5)
    assert (train.rpn_positive_overlap, train.rpn_negative_overlap) == (0.7, 0.3)
    assert (train.rpn_nms_thresh, train.rpn_pre_nms_top_n, train.rpn_post_nms_top_n) == (0.7, 2000, 2000)
    assert (test.rpn_nms_thresh, test.rpn_pre_nms_top_n, test.rpn_post_nms_top_n) == (0.7, 1000, 1000)
    assert (test.nms_thresh, test.max_det, test.score_thresh) == (0.5, 100, 0.05)
    assert (test.panoptic_score_thresh, test.panoptic_stuff_area_limit) == (0.6, 4096)
    assert train.panoptic_box_keep_fraction == 0.7
    assert train.compat is None and train.total_batch is None and recipe.dataset.limit is None
    assert recipe.dataset.num_workers == 4 and recipe.seed == 235


def test_a_whole_number_passes_for_a_number_and_a_number_for_a_list():
    assert recipe_with("train.lr", "1").train.lr == 1.0
    assert recipe_with("test.scales", "480").test.scales == (480,)
    assert recipe_with("train.scales", "[640, 800]").train.scales == (640, 800)
    assert recipe_with("train.decay_iteration", "5").train.decay_iteration == (5,)
    assert recipe_with("gpus", "0").gpus == "0"
    assert recipe_with("gpus", "'0,1, 2'").gpus == "0,1, 2"


def test_recipes_are_immutable_and_hashable():
    recipe = recipe_of(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.lr = 1.0
    assert hash(recipe) == hash(recipe_of(MINIMAL))


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("train.lr", "-0.02", "must be greater than 0, got -0.02"),
        ("train.lr", "0", "must be greater than 0, got 0"),
        ("train.lr", ".nan", "must be a finite number, got nan"),
        ("train.lr", "fast", "must be a number, got 'fast'"),
        ("train.lr", "'0.02'", "must be a number, got '0.02'"),
        ("train.lr", "true", "must be a number, got true"),
        ("train.lr", "null", "must be a number, got null"),
        ("train.max_iteration", "true", "must be a whole number, got true"),
        ("train.max_iteration", "10.5", "must be a whole number, got 10.5"),
        ("train.max_iteration", "9e4", "must be a whole number, got 90000.0"),
        ("train.batch_size", "0", "must be at least 1, got 0"),
        ("train.total_batch", "0", "must be at least 1, got 0"),
        ("test.batch_size", "-1", "must be at least 1, got -1"),
        ("train.flip", "1", "must be true or false, got 1"),
        ("train.flip", "'yes'", "must be true or false, got 'yes'"),
        ("train.scales", "[]", "needs at least 1 value(s), got []"),
        ("train.scales", "[800, big]", "must be a whole number, got 'big'"),
        ("train.scales", "[800, 0]", "must be at least 1, got 0"),
        ("test.scales", "true", "must be a list, got true"),
        ("test.scales", "[800, 600, 800]", "must name each scale once, got [800, 600, 800]"),
        ("train.decay_iteration", "[80000, 60000]", "must be in ascending order, got [80000, 60000]"),
        ("train.decay_iteration", "[5, 5]", "must be in ascending order, got [5, 5]"),
        ("train.precision", "fp8", "must be 'fp32', 'bf16' or 'fp16', got 'fp8'"),
        ("train.compat", "old", "must be 'original', got 'old'"),
        ("train.momentum", "1", "must be less than 1, got 1"),
        ("train.wd", "-1", "must be at least 0, got -1"),
        ("train.fg_fraction", "1.5", "must be at most 1, got 1.5"),
        ("train.panoptic_box_keep_fraction", "0", "must be greater than 0, got 0"),
        ("test.score_thresh", "-0.1", "must be at least 0, got -0.1"),
        ("test.nms_thresh", "2", "must be at most 1, got 2"),
        ("network.mask_size", "27", "must be even, got 27"),
        ("network.mask_size", "0", "must be at least 2, got 0"),
        ("network.backbone_freeze_at", "6", "must be at most 5, got 6"),
        ("network.backbone_with_dconv", "2", "must be at least 3, got 2"),
        ("network.pixel_means", "[1, 2]", "needs more values, got [1, 2]"),
        ("network.pixel_means", "[1, 2, 3, 4]", "takes at most 3 value(s), got [1, 2, 3, 4]"),
        ("network.bbox_reg_weights", "[10, 10, 5, 0]", "must be greater than 0, got 0"),
        ("network.fpn_with_norm", "layer_norm", "must be 'none', 'group_norm' or 'batch_norm', got 'layer_norm'"),
        ("symbol", "resnet_152_upsnet", "got 'resnet_152_upsnet'"),
        ("system", "mask2former", "must be 'upsnet', got 'mask2former'"),
        ("gpus", "all", "must be device numbers separated by commas, each once, such as '0,1', got 'all'"),
        ("gpus", "'0,0'", "each once, such as '0,1', got '0,0'"),
        ("seed", "-1", "must be at least 0, got -1"),
        ("output_path", "''", "must not be empty, got ''"),
        ("output_path", "3", "must be text, got 3"),
        ("dataset.image_set", "train++extra", "must be an image set, or several joined by '+', got 'train++extra'"),
        ("dataset.limit", "0", "must be at least 1, got 0"),
    ],
)
def test_a_wrong_value_is_named_by_key_and_file(key, value, rule):
    with pytest.raises(RecipeError) as caught:
        recipe_with(key, value)
    message = str(caught.value)
    assert message.startswith(f"key '{key}' in my.yaml: ")
    assert message.endswith(rule)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("network: {num_anchors: 2}", "num_anchors (2) must be ratios × scales = 3"),
        (
            "network: {fpn_with_norm: group_norm, fpn_feature_dim: 40}",
            "needs fpn_feature_dim (40) to be a multiple of 32",
        ),
        ("network: {rcnn_with_norm: group_norm, mask_feature_dim: 40}", "needs mask_feature_dim (40)"),
        ("network: {fcn_with_norm: group_norm, fcn_feature_dim: 40}", "needs fcn_feature_dim (40)"),
    ],
)
def test_values_that_contradict_each_other(text, message):
    with pytest.raises(RecipeError) as caught:
        recipe_of(MINIMAL + text)
    assert message in str(caught.value)
    assert str(caught.value).startswith("key 'network' in my.yaml: ")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.bg_thresh_lo", "0.6", "bg_thresh_lo (0.6) must not lie above bg_thresh_hi (0.5)"),
        (
            "train.rpn_negative_overlap",
            "0.8",
            "rpn_negative_overlap (0.8) must not lie above rpn_positive_overlap (0.7)",
        ),
    ],
)
def test_thresholds_in_the_wrong_order(key, value, message):
    with pytest.raises(RecipeError) as caught:
        recipe_with(key, value)
    assert str(caught.value) == f"key 'train' in my.yaml: {message}"


def test_total_batch_must_be_reachable():
    text = "dataset: {dataset_path: d, image_set: a, test_image_set: b}\ntrain: {lr: 1, max_iteration: 1, "
    assert recipe_of(text + "batch_size: 2, total_batch: 8}").train.total_batch == 8
    with pytest.raises(RecipeError, match=r"total_batch \(3\) must be a multiple of batch_size \(2\)"):
        recipe_of(text + "batch_size: 2, total_batch: 3}")


def test_class_counts_must_agree():
    text = "train: {lr: 1, max_iteration: 1}\ndataset: {dataset_path: d, image_set: a, test_image_set: b, "
    assert recipe_of(text + "num_classes: 9, num_seg_classes: 8}").dataset.num_classes == 9
    with pytest.raises(RecipeError, match=r"num_seg_classes \(7\) counts every class, so 8 at least"):
        recipe_of(text + "num_classes: 9, num_seg_classes: 7}")


def test_keys_with_one_value_say_what_to_do():
    changed = {bool: "false", str: "OtherHead", int: "16", tuple: "[4, 8]"}
    for key, advice in ONE_VALUE.items():
        section, _, last = key.partition(".")
        default = SECTIONS[section].model_fields[last].default
        value = "true" if default is False else changed[type(default)]
        with pytest.raises(RecipeError) as caught:
            recipe_with(key, value)
        assert str(caught.value).startswith(f"key '{key}' in my.yaml: ")
        assert str(caught.value).endswith(advice)


def test_every_key_has_a_meaning():
    assert all(field.description for field in Recipe.model_fields.values())
    assert all(field.description for options in SECTIONS.values() for field in options.model_fields.values())


def test_key_lists_are_consistent():
    known = recipe_keys()
    assert len(known) == len(set(known))
    assert set(ONE_VALUE) <= set(known)
    assert not set(NO_EFFECT) & set(known)
