import logging
import os

import pytest

from upsnet.config import dump_recipe, load_recipe
from upsnet.config.load import EXPERIMENTS
from upsnet.structures.errors import RecipeError

MINIMAL = """
dataset: {dataset_path: data, image_set: train, test_image_set: val}
train: {lr: 0.01, max_iteration: 10}
"""

# The keys of an original recipe, in the original's structure.
ORIGINAL = """
output_path: ./output/upsnet/coco
model_prefix: upsnet_resnet_50_coco_
symbol: resnet_50_upsnet
gpus: '0,1,2,3'
dataset:
  root_path: ./data/
  num_classes: 81
  num_seg_classes: 133
  dataset: coco
  dataset_path: ./data/coco/
  image_set: train2017
  test_image_set: val2017
network:
  has_rpn: true
  has_rcnn: true
  has_mask_head: true
  has_fcn_head: true
  has_panoptic_head: true
  fcn_head: FCNHead
  fpn_with_gap: true
  pretrained: ./model/pretrained_model/resnet-50-caffe.pth
train:
  use_horovod: false
  scales:
  - 800
  max_size: 1333
  display_iter: 20
  snapshot_step: 2000
  resume: false
  begin_iteration: 0
  max_iteration: 360000
  decay_iteration:
  - 240000
  - 320000
  warmup_iteration: 1500
  lr: 0.005
  wd: 0.0001
  momentum: 0.9
  batch_size: 1
  eval_data: true
  panoptic_box_keep_fraction: 0.7
  fcn_loss_weight: 0.2
  fcn_with_roi_loss: true
  panoptic_loss_weight: 0.1
test:
  scales:
  - 800
  max_size: 1333
  batch_size: 1
  test_iteration: 360000
  vis_mask: false
  panoptic_stuff_area_limit: 4096
"""


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(*arguments) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_original_yaml_loads_unchanged(write, caplog):
    with caplog.at_level(logging.WARNING, "upsnet"):
        recipe = load_recipe(write("upsnet_resnet50_coco_4gpu.yaml", ORIGINAL))
    assert recipe.name == "upsnet_resnet50_coco_4gpu"
    assert recipe.gpus == "0,1,2,3"
    assert recipe.dataset.num_seg_classes == 133
    assert recipe.train.decay_iteration == (240000, 320000)
    assert recipe.train.scales == (800,)
    assert recipe.test.test_iteration == 360000
    assert recipe.train.total_batch is None and recipe.train.compat is None
    [record] = caplog.records
    assert record.getMessage().endswith("these keys have no effect: dataset.root_path")


def test_all_idle_keys_are_named_in_one_warning(write, caplog):
    text = MINIMAL + "network: {binary_thresh: 0.5, has_mask_rcnn: true}\n"
    with caplog.at_level(logging.WARNING, "upsnet"):
        load_recipe(write("a.yaml", text), ["train.bbox_means=[0, 0, 0, 0]"])
    [record] = caplog.records
    for key in ("network.binary_thresh", "network.has_mask_rcnn", "train.bbox_means"):
        assert key in record.getMessage()
    assert "a.yaml" in record.getMessage()


def test_a_clean_recipe_gives_no_warning(write, caplog):
    load_recipe(write("a.yaml", MINIMAL))
    assert not caplog.records


def test_later_layers_win_key_by_key(write):
    write("bottom.yaml", MINIMAL + "test: {scales: [800], max_size: 1000, max_det: 7}\nseed: 1\n")
    write("middle.yaml", "base: bottom.yaml\ntest: {scales: [640, 700], nms_thresh: 0.3}\nseed: 2\n")
    top = write("top.yaml", "base: middle.yaml\ntest: {nms_thresh: 0.4}\n")
    recipe = load_recipe(top, ["test.max_det=9"])
    assert recipe.test.scales == (640, 700)  # replaced, not joined
    assert (recipe.test.max_size, recipe.test.nms_thresh, recipe.test.max_det) == (1000, 0.4, 9)
    assert recipe.seed == 2
    assert recipe.name == "top"


def test_several_bases_in_order(write):
    write("data.yaml", MINIMAL)
    write("one.yaml", "seed: 1\ngpus: '1'\n")
    write("two.yaml", "seed: 2\n")
    recipe = load_recipe(write("top.yaml", "base: [data.yaml, one.yaml, two.yaml]\n"))
    assert (recipe.seed, recipe.gpus) == (2, "1")


def test_two_bases_may_share_a_base(write):
    write("root.yaml", MINIMAL + "seed: 1\n")
    write("left.yaml", "base: root.yaml\nseed: 5\n")
    write("right.yaml", "base: root.yaml\n")
    assert load_recipe(write("top.yaml", "base: [left.yaml, right.yaml]\n")).seed == 1


def test_base_is_relative_to_the_file(write, tmp_path, monkeypatch):
    write("shared/base.yaml", MINIMAL)
    path = write("mine/top.yaml", "base: ../shared/base.yaml\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe(path.relative_to(tmp_path)).train.lr == 0.01


def test_base_may_be_a_shipped_recipe(write):
    path = write("my.first.yaml", "base: upsnet_resnet50_panoptic\ndataset: {dataset_path: data/my}\n")
    recipe = load_recipe(path)
    assert recipe.dataset.dataset == "panoptic"
    assert recipe.dataset.dataset_path == "data/my"
    assert recipe.name == "my"


def test_base_cycles_are_refused(write):
    write("a.yaml", "base: b.yaml\n")
    path = write("b.yaml", "base: a.yaml\n")
    assert "'base' leads back to a file that builds on it (b.yaml → a.yaml → b.yaml)" in refusal(path)
    assert "self.yaml → self.yaml" in refusal(write("self.yaml", "base: self.yaml\n"))


def test_missing_base_is_named_with_the_file_that_wants_it(write):
    message = refusal(write("a.yaml", "base: gone.yaml\n"))
    assert message.startswith(f"key 'base' in {write('a.yaml', '').as_posix()}: recipe ")
    assert "gone.yaml is not there" in message


def test_base_of_a_wrong_type(write):
    assert "must be the name of a yaml file or a list of names, got 3" in refusal(write("a.yaml", "base: 3\n"))


def test_bare_names_find_shipped_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("upsnet_resnet50_coco_16gpu")
    assert recipe.name == "upsnet_resnet50_coco_16gpu"
    assert recipe == load_recipe(str(EXPERIMENTS / "upsnet_resnet50_coco_16gpu.yaml"))


def test_missing_recipe_lists_the_shipped_ones():
    message = refusal("upsnet_resnet50_kitti")
    assert "upsnet_resnet50_kitti is not there" in message
    assert "upsnet_resnet50_coco_16gpu" in message and "_base" not in message


def test_unknown_keys_name_file_and_nearest_key(write):
    path = write("a.yaml", MINIMAL + "test: {scale: [480]}\n")
    assert refusal(path) == f"unknown key 'test.scale' in {path}: the nearest known key is 'test.scales'"
    path = write("a.yaml", MINIMAL + "trian: {momentum: 0.9}\n")
    assert refusal(path) == f"unknown key 'trian' in {path}: the nearest known key is 'train'"
    path = write("a.yaml", MINIMAL + "max_iteration: 5\n")
    assert "nearest known key is 'train.max_iteration'" in refusal(path)
    path = write("a.yaml", "dataset: {path: data}\n")
    assert "nearest known key is 'dataset.dataset_path'" in refusal(path)
    path = write("a.yaml", MINIMAL + "bases: x\n")
    assert "nearest known key is 'base'" in refusal(path)
    path = write("a.yaml", MINIMAL + "3: x\n")
    assert f"unknown key '3' in {path}" in refusal(path)


def test_a_misspelt_required_key_is_reported_as_misspelt(write):
    path = write("a.yaml", MINIMAL.replace("lr:", "Lr:"))
    assert refusal(path) == f"unknown key 'train.Lr' in {path}: the nearest known key is 'train.lr'"


def test_the_file_to_blame_is_the_one_that_has_the_key(write):
    base = write("base.yaml", MINIMAL + "test: {max_det: none, nms_thresh: 0.5, typo: 1}\n")
    top = write("top.yaml", "base: base.yaml\n")
    assert refusal(top).startswith(f"unknown key 'test.typo' in {base}")
    base.write_text(MINIMAL + "test: {max_det: none}\n")
    assert refusal(top).startswith(f"key 'test.max_det' in {base}: must be a whole number")
    assert refusal(top, ["test.max_det=0"]) == "key 'test.max_det' in the overrides: must be at least 1, got 0"


def test_required_keys_are_named_with_their_meaning(write):
    path = write("a.yaml", "train: {lr: 0.01, max_iteration: 10}\n")
    assert refusal(path).startswith(f"{path} lacks the key 'dataset.dataset_path' (folder of the data set")
    assert "lacks the key" in refusal(write("empty.yaml", ""))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: 5\n", "key 'train' in {path}: must be a section of keys, got 5"),
        ("- a\n- b\n", "{path}: a recipe consists of `key: value` lines, this is a list"),
        ("train: {lr: 1\n", "{path}, line 2: this is not valid yaml"),
        ("seed: 1\nseed: 2\n", "{path}, line 2: this is not valid yaml: the key 'seed' stands twice in one section"),
        ("train:\n  lr: 1\n  wd: 0\n  lr: 2\n", "{path}, line 4: this is not valid yaml: the key 'lr' stands twice"),
        ("seed: 2020-13-45\n", "{path}: this is not valid yaml: month must be in 1..12"),
        ("seed: !!python/object/apply:os.getcwd []\n", "{path}, line 1: this is not valid yaml: could not determine"),
    ],
)
def test_damaged_files(write, text, message):
    path = write("a.yaml", text)
    assert refusal(path).startswith(message.format(path=path))


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    assert "cannot be read as a yaml file" in refusal(path)


def test_a_folder_is_no_recipe(tmp_path):
    assert f"recipe {tmp_path} is not there" in refusal(tmp_path)


def test_sections_without_content_keep_the_defaults(write):
    recipe = load_recipe(write("a.yaml", MINIMAL + "network:\ntest:\n  # max_det: 5\n"))
    assert recipe.test.max_det == 100


def test_overrides_hold_yaml_values(write):
    path = write("a.yaml", MINIMAL + "network: {pretrained: x.pth}\n")
    recipe = load_recipe(
        path,
        [
            "train.lr=5e-3",
            "train.wd=1E-5",
            "test.scales=[480, 512]",
            "network.pretrained=null",
            "train.flip=false",
            "dataset.dataset_path=data/a=b",
            "gpus=1",
            "output_path='07'",
        ],
    )
    assert (recipe.train.lr, recipe.train.wd, recipe.test.scales) == (0.005, 1e-5, (480, 512))
    assert recipe.network.pretrained is None
    assert recipe.train.flip is False
    assert recipe.dataset.dataset_path == "data/a=b"
    assert (recipe.gpus, recipe.output_path) == ("1", "07")


def test_overrides_as_a_mapping(write):
    path = write("a.yaml", MINIMAL)
    recipe = load_recipe(path, {"test.scales": [480], "train": {"lr": 0.5}, "dataset.limit": 3})
    assert (recipe.test.scales, recipe.train.lr, recipe.dataset.limit) == ((480,), 0.5, 3)
    assert recipe.train.max_iteration == 10
    assert load_recipe(path, {"test.scales": (480, 600)}).test.scales == (480, 600)


def test_a_later_override_wins(write):
    assert load_recipe(write("a.yaml", MINIMAL), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr", "override 'train.lr' must have the form key=value"),
        ("=5", "override '=5' must have the form key=value"),
        ("train.lr=[1", "override 'train.lr=[1', line 1: this is not valid yaml"),
        ("train.lrr=1", "unknown key 'train.lrr' in the overrides: the nearest known key is 'train.lr'"),
        ("lr=1", "unknown key 'lr' in the overrides: the nearest known key is 'train.lr'"),
        ("train.lr.x=1", "key 'train.lr' in the overrides: must be a number"),
        ("train=1", "key 'train' in the overrides: must be a section of keys, got 1"),
        ("base=x.yaml", "key 'base' in the overrides: only a yaml file can build on another one"),
        (
            "network.backbone_with_dilation=true",
            "key 'network.backbone_with_dilation' in the overrides: true is not supported, only false: the pyramid",
        ),
    ],
)
def test_wrong_overrides(write, override, message):
    assert refusal(write("a.yaml", MINIMAL), [override]).startswith(message)


def test_debug_mode_means_one_plain_worker(write):
    path = write("a.yaml", MINIMAL + "gpus: '0,1'\n")
    overrides = ["train.use_horovod=true"]
    assert load_recipe(path, overrides).train.use_horovod
    recipe = load_recipe(path, [*overrides, "debug_mode=true"])
    assert not recipe.train.use_horovod
    assert recipe.gpus == "0"


def test_exponents_without_a_point_are_numbers(write):
    path = write("a.yaml", MINIMAL.replace("0.01", "1e-2") + "network: {anchor_scales: [1e+1]}\nname: 1e5x\n")
    recipe = load_recipe(path)
    assert (recipe.train.lr, recipe.network.anchor_scales, recipe.name) == (0.01, (10.0,), "1e5x")


def test_the_name_can_be_set(write):
    assert load_recipe(write("a.yaml", MINIMAL + "name: mine\n")).name == "mine"


@pytest.mark.parametrize("name", ["upsnet_resnet18_shapes", "upsnet_resnet50_cityscapes_16gpu"])
def test_a_dump_loads_to_the_same_recipe(name, write):
    recipe = load_recipe(name, {"train.wd": 1e-5, "output_path": "1e-3", "model_prefix": "yes", "gpus": "0,1"})
    assert load_recipe(write("dumped.yaml", dump_recipe(recipe))) == recipe


def test_the_link_at_the_top_leads_to_the_recipes():
    link = EXPERIMENTS.parent.parent / "experiments"
    assert os.readlink(link) == "upsnet/experiments"
    assert load_recipe(link / "upsnet_resnet50_coco_4gpu.yaml").train.lr == 0.005
