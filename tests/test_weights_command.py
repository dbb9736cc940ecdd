"""`upsnet weights`: what it says of every kind of file, and what it writes."""

import re

import pytest
import torch
import torchvision

import upsnet
from tests.checkpoints.weights import small_network, small_recipe, write_table
from tests.tiny import upsnet as run
from upsnet.checkpoints.files import read_weights
from upsnet.checkpoints.released import to_released
from upsnet.structures.class_tables import class_table

COCO_50 = ["upsnet_resnet50_coco_16gpu", "upsnet_resnet50_coco_4gpu", "upsnet_resnet50_coco_8gpu"]
CITY_50 = ["upsnet_resnet50_cityscapes_16gpu", "upsnet_resnet50_cityscapes_4gpu"]
CITY_101, DCN_101 = "upsnet_resnet101_cityscapes_w_coco_16gpu", "upsnet_resnet101_dcn_coco_3x_16gpu"
PANOPTIC, SHAPES = "upsnet_resnet50_panoptic", "upsnet_resnet18_shapes"


def said(path):
    """The rows by title, and the recipes by use."""
    ran = run("weights", path)
    assert ran.code == 0, ran.err
    head, *fits = re.split(r"^fits (?:only )?as ", ran.out, flags=re.M)
    rows = dict(re.split(r"\s{2,}|(?<=training step|semantic head) ", line, maxsplit=1) for line in head.splitlines())
    return rows, {use.split(" of")[0]: re.findall(r"^  (\S+)$", use, flags=re.M) for use in fits}


@pytest.mark.parametrize(
    "name, backbone, classes, average, layers, fits, starts",
    [
        (COCO_50[0], "ResNet-50, deformable stages: none", "those of coco", "with", 3, [*COCO_50, PANOPTIC], CITY_50),
        (
            CITY_50[0], "ResNet-50, deformable stages: none", "those of Cityscapes", "no", 2, CITY_50,
            [*COCO_50, PANOPTIC],
        ),
        (
            DCN_101, "ResNet-101, deformable stages: res3, res4, res5", "those of coco", "with", 3, [DCN_101],
            [CITY_101],
        ),
    ],
)  # fmt: skip
def test_released_files(name, backbone, classes, average, layers, fits, starts, shared, tmp_path):
    path = write_table(tmp_path / "w.pth", shared(f"reference/checkpoint_keys/{name}.json"))
    rows, found = said(path)
    assert rows["kind"] == "UPSNet, as released" and rows["format"] == "torch" and rows["backbone"] == backbone
    assert rows["classes"].endswith(classes) and rows["pyramid"].startswith(f"{average} global average")
    assert rows["semantic head"].startswith(f"{layers} layers")
    assert {use: sorted(names) for use, names in found.items()} == {
        "--weight_path": sorted(fits), "network.pretrained": sorted(starts)
    }  # fmt: skip


def test_a_snapshot_of_ours(tiny_run):
    rows, found = said(tiny_run.weights)
    assert rows["kind"] == "UPSNet, ours" and rows["training step"] == "2" and rows["recipe"] == "stored inside"
    assert rows["classes"] == "C = 4, S = 5: 3 things, 2 stuff, named inside" and "ResNet-18" in rows["backbone"]
    assert re.match(r"\d+ \(\d+ float32, 20 int64\), 11\.\d\d million", rows["tensors"])
    assert found == {"--weight_path": [], "network.pretrained": [SHAPES]}


@pytest.mark.parametrize("name, convention", [("w.pth", "unknown: set "), ("resnet-50-caffe.pth", "caffe (stride in ")])
def test_a_resnet(name, convention, tmp_path):
    with torch.device("meta"):
        state = torchvision.models.resnet50().state_dict()
    torch.save({key: torch.zeros((), dtype=t.dtype).expand(t.shape) for key, t in state.items()}, tmp_path / name)
    rows, found = said(tmp_path / name)
    assert rows["kind"] == "ResNet" and rows["convention"].startswith(convention) and "classes" not in rows
    assert found == {"--weight_path": [], "network.pretrained": sorted([*COCO_50, *CITY_50, PANOPTIC])}


def test_something_else(tmp_path):
    torch.save({"encoder.weight": torch.ones(2)}, tmp_path / "w.pth")
    rows, found = said(tmp_path / "w.pth")
    assert rows["kind"] == "unknown" and rows["names"].startswith("encoder.weight")
    assert found == {"--weight_path": [], "network.pretrained": []}


@pytest.mark.parametrize("form, default", [("original", "tiny_2_original.pth"), ("safetensors", "tiny_2.safetensors")])
def test_written_beside_the_file_or_elsewhere(form, default, tiny_run, tmp_path):
    path = tmp_path / "tiny_2.pth"
    path.hardlink_to(tiny_run.weights)
    ran = run("weights", path, "--to", form)
    assert ran.code == 0 and ran.out == f"{path} (UPSNet, ours) as {form}: {tmp_path / default}\n"
    assert run("weights", path, "--to", form, "--out", tmp_path / "x" / "y.pth").code == 0
    state = read_weights(path).state
    for out in (tmp_path / default, tmp_path / "x" / "y.pth"):
        written = read_weights(out).state
        assert written.keys() == state.keys() and all(torch.equal(written[name], state[name]) for name in state)


def test_refused_in_one_sentence(tiny_run, tmp_path):
    torch.save({**torch.load(tiny_run.weights, weights_only=True), "recipe": "a: ["}, tmp_path / "odd.pth")
    for arguments, sentence in (
        ((tmp_path / "odd.pth",), "the recipe inside"),
        ((tmp_path / "no.pth",), "there is no weight file"),
        ((tiny_run.weights, "--out", tmp_path / "x.pth"), "add --to original or --to safetensors"),
        ((tiny_run.weights, "--to", "original", "--out", tiny_run.weights), "give another --out"),
    ):
        ran = run("weights", *arguments)
        assert ran.code == 2 and len(ran.errors) == 1 and sentence in ran.errors[0] and not ran.out
    assert run("weights", tiny_run.weights, "--to", "onnx").code == 2


def test_a_released_file_works_without_any_data_set(tmp_path):
    """As `weights=`, under the released names, with and without prefix, in every container."""
    coco = class_table("coco")
    recipe = small_recipe()
    network = small_network(recipe, coco)
    overrides = ["test.scales=[32]", "test.max_size=32", *(f"network.{key}_dim=8" for key in (
        "fpn_feature", "fcn_feature", "rcnn_feature", "mask_feature"
    )), "symbol=resnet_18_upsnet", f"dataset.dataset_path={tmp_path}/none"]  # fmt: skip
    state = to_released(network.state_dict(), "w.pth")
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "w.pth")
    predictor = upsnet.load("upsnet_resnet50_coco_16gpu", tmp_path / "w.pth", "cpu", overrides)
    assert predictor.categories == coco
    assert all(torch.equal(t, network.state_dict()[name]) for name, t in predictor.model.state_dict().items())
    result = predictor.predict(torch.randint(256, (32, 32, 3), dtype=torch.uint8).numpy())
    assert result.segment_map.shape == (32, 32)
    assert run("weights", tmp_path / "w.pth", "--to", "safetensors").code == 0
    again = upsnet.load("upsnet_resnet50_coco_16gpu", tmp_path / "w.safetensors", "cpu", overrides)
    assert all(torch.equal(t, network.state_dict()[name]) for name, t in again.model.state_dict().items())
