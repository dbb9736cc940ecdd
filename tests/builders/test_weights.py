"""Weights of a recipe: their convention must be that of network and transform; trained ones must fit."""

import logging

import numpy as np
import pytest
import torch
import torchvision

from tests.checkpoints.weights import small_network, small_recipe
from upsnet import builders
from upsnet.builders.weights import CONVENTION, UNSEEN
from upsnet.checkpoints.files import read_weights
from upsnet.config import dump_recipe
from upsnet.structures.categories import Categories, Category
from upsnet.structures.class_tables import class_table
from upsnet.structures.errors import RecipeError, WeightsError

COCO = class_table("coco")
TORCHVISION = ("network.use_caffe_model=false", "network.backbone_stride_in_1x1=false")


def meta_weights(path, depth):
    """torchvision's ResNet, all 0; each tensor is stored as one number."""
    with torch.device("meta"):
        state = getattr(torchvision.models, f"resnet{depth}")().state_dict()
    torch.save({name: torch.zeros((), dtype=t.dtype).expand(t.shape) for name, t in state.items()}, path)


def start(path, *overrides):
    recipe = small_recipe("upsnet_resnet50_coco_16gpu", f"network.pretrained={path}", *overrides)
    network = builders.build_network(recipe, COCO)
    builders.start_from_pretrained(recipe, network, COCO)
    return recipe, network


@pytest.fixture(scope="module")
def resnet50(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet-50-caffe.pth"
    meta_weights(path, 50)
    return path


@pytest.fixture(scope="module")
def unnamed(resnet50):
    return resnet50.rename(resnet50.with_name("w.pth")) and _linked(resnet50)


def _linked(path):
    path.hardlink_to(path.with_name("w.pth"))
    return path.with_name("w.pth")


DEPTH = "symbol=resnet_50_upsnet"


def test_the_original_yaml_works_as_it_stands(resnet50, caplog):
    caplog.set_level(logging.INFO, "upsnet")
    start(resnet50, DEPTH)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"network.pretrained {resnet50}: ResNet, 265 tensors",
        "network.pretrained convention: caffe, known from its name",
        "network.pretrained loaded: backbone (265)",
        "network.pretrained missing, so initialised anew: fpn (18), rpn (6), box_head (8), mask_head (12), "
        "semantic_head (14)",
    ]


def test_an_unknown_convention_is_asked_for(unnamed):
    with pytest.raises(RecipeError, match=r"nothing tells the convention of .*w\.pth.*set network\.pretrained_conv"):
        start(unnamed, DEPTH)
    start(unnamed, DEPTH, "network.pretrained_convention=caffe")
    start(unnamed, DEPTH, "network.pretrained_convention=torchvision", *TORCHVISION)


@pytest.mark.parametrize(
    "convention, settings, advice",
    [
        ("torchvision", (), "network.use_caffe_model=false network.backbone_stride_in_1x1=false"),
        ("torchvision", TORCHVISION[:1], "network.backbone_stride_in_1x1=false"),
        ("torchvision", TORCHVISION[1:], "network.use_caffe_model=false"),
        ("caffe", TORCHVISION[1:], "network.backbone_stride_in_1x1=true"),
        ("caffe", TORCHVISION, "network.use_caffe_model=true network.backbone_stride_in_1x1=true"),
    ],
)
def test_a_recipe_of_the_other_convention_is_told_what_to_set(unnamed, convention, settings, advice):
    with pytest.raises(RecipeError) as caught:
        start(unnamed, DEPTH, f"network.pretrained_convention={convention}", *settings)
    assert str(caught.value).endswith(f"the recipe says otherwise: set {advice}")
    start(unnamed, DEPTH, f"network.pretrained_convention={convention}", *settings, *advice.split())


def test_without_bottlenecks_only_the_input_counts(tmp_path):
    meta_weights(tmp_path / "w.pth", 18)
    start(tmp_path / "w.pth", "network.pretrained_convention=torchvision", TORCHVISION[0])
    with pytest.raises(RecipeError, match=r"set network\.use_caffe_model=false$"):
        start(tmp_path / "w.pth", "network.pretrained_convention=torchvision")


@torch.no_grad()
def test_the_stem_sees_the_channels_that_it_was_trained_on(tmp_path):
    """A stem that answers to red alone answers to a red photo, and as strongly as with torchvision's own transform."""
    model = torchvision.models.resnet18()
    model.conv1.weight.zero_()
    model.conv1.weight[:, 0] = 1
    torch.save(model.state_dict(), tmp_path / "w.pth")
    recipe, network = start(tmp_path / "w.pth", "network.pretrained_convention=torchvision", TORCHVISION[0])
    photo = np.zeros((64, 64, 3), np.uint8)
    photo[..., 0] = 200
    ours = network.backbone.stem.conv(builders.training_transform(recipe).image(photo, 1.0)[None])
    normalise = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    theirs = model.conv1(normalise(torch.from_numpy(photo).permute(2, 0, 1) / 255)[None])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert ours[0, 0, 16, 16] > 40


def snapshot(path, network, categories, recipe=""):
    record = {"weights": network.state_dict(), "categories": categories.to_coco(), "recipe": recipe}
    torch.save({**record, "format_version": 1}, path)
    return read_weights(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    network = small_network(small_recipe(), COCO)
    return network, snapshot(tmp_path_factory.mktemp("weights") / "s.pth", network, COCO)


def test_trained_weights_that_fit(trained):
    source, file = trained
    network = builders.build_network(small_recipe(), COCO)
    builders.load_trained(small_recipe(), network, file, COCO)
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in network.state_dict().items())


def test_trained_weights_of_another_shape_are_refused(trained):
    network = builders.build_network(small_recipe("upsnet_resnet50_coco_16gpu", "network.rcnn_feature_dim=16"), COCO)
    with pytest.raises(
        WeightsError, match=r"another network \(6 of another shape: box_head\.fc6\.weight \(8×392, here"
    ):
        builders.load_trained(small_recipe(), network, trained[1], COCO)


def test_trained_weights_of_other_classes_are_refused(trained):
    renamed = Categories(Category(c.id, "lamp" if c.name == "light" else c.name, c.is_thing, c.color) for c in COCO)
    with pytest.raises(WeightsError, match=r"number 12 is 'light' \(id \d+\) there and 'lamp' \(id \d+\) in the data"):
        builders.load_trained(small_recipe(), trained[0], trained[1], renamed)
    cityscapes = class_table("Cityscapes")
    network = builders.build_network(small_recipe("upsnet_resnet50_cityscapes_16gpu"), cityscapes)
    with pytest.raises(WeightsError, match="other classes"):
        builders.load_trained(small_recipe(), network, trained[1], cityscapes)


def test_a_resnet_alone_is_no_trained_network(resnet50):
    with pytest.raises(WeightsError, match=r"is a ResNet alone.*network\.pretrained"):
        recipe = small_recipe()
        builders.load_trained(recipe, builders.build_network(recipe, COCO), read_weights(resnet50), COCO)


OTHERS = {
    "use_caffe_model": "false", "pixel_means": "[1, 2, 3]", "backbone_stride_in_1x1": "false",
    "fpn_upsample_method": "bilinear", "anchor_ratios": "[0.4, 1, 2]", "anchor_scales": "[4]",
    "bbox_reg_weights": "[1, 1, 1, 1]",
}  # fmt: skip


@pytest.fixture(scope="module")
def with_recipe(tmp_path_factory):
    recipe = small_recipe()
    path = tmp_path_factory.mktemp("weights") / "s.pth"
    return snapshot(path, small_network(recipe, COCO), COCO, dump_recipe(recipe))


def test_what_no_tensor_shows_must_be_as_in_training(with_recipe):
    assert OTHERS.keys() == set(UNSEEN)
    for key, other in OTHERS.items():
        changed = small_recipe("upsnet_resnet50_coco_16gpu", f"network.{key}={other}")
        with pytest.raises(WeightsError, match=f"trained with network.{key} .*, this recipe says"):
            builders.load_trained(changed, builders.build_network(changed, COCO), with_recipe, COCO)
    recipe = small_recipe()
    builders.load_trained(recipe, builders.build_network(recipe, COCO), with_recipe, COCO)


@pytest.mark.parametrize("key", UNSEEN)
def test_a_start_from_trained_weights_keeps_input_and_strides_of_the_backbone(with_recipe, key):
    change = f"network.{key}={OTHERS[key]}"
    if key in CONVENTION:
        with pytest.raises(WeightsError, match=f"trained with network.{key} True, this recipe says False: set"):
            start(with_recipe.path, change)
    else:
        start(with_recipe.path, change)


def test_what_a_file_fits(with_recipe, resnet50):
    assert builders.fit(small_recipe(), with_recipe) == "--weight_path"
    for key, other in OTHERS.items():
        changed = small_recipe("upsnet_resnet50_coco_16gpu", f"network.{key}={other}")
        assert builders.fit(changed, with_recipe) == (None if key in CONVENTION else "network.pretrained")
    assert builders.fit(small_recipe("upsnet_resnet50_cityscapes_16gpu"), with_recipe) == "network.pretrained"
    assert builders.fit(small_recipe(), read_weights(resnet50)) is None
