"""The manifest of weight files: complete, consistent, and what the recipes and the readers want."""

import re
from pathlib import Path

import pytest
import yaml

from upsnet.checkpoints.manifest import groups, known_file, known_files

ROOT = Path(__file__).resolve().parents[2]
RELEASED = {
    "upsnet_resnet_50_coco_90000.pth",
    "upsnet_resnet_101_dcn_coco_270000.pth",
    "upsnet_resnet_50_cityscapes_12000.pth",
    "upsnet_resnet_101_cityscapes_w_coco_3000.pth",
    "upsnet_resnet_101_coco_pretrained_for_cityscapes.pth",
}

each_file = pytest.mark.parametrize("file", known_files(), ids=lambda file: file.name)


@each_file
def test_every_file_is_described(file):
    assert file.group in groups() and file.sources and not file.path.startswith(("/", "model"))
    assert (file.kind == "resnet") == (file.convention is not None)
    for source in file.sources:
        assert re.match(r"https?://", source.url)
        assert source.sha256 is None or re.fullmatch(r"[0-9a-f]{8,64}", source.sha256)
        assert source.sha256 or source.note, "say why there is no checksum"


@each_file
def test_a_digit_in_a_sources_name_is_its_checksum(file):
    """OpenMMLab and torchvision write the first eight digits of the SHA-256 into the name."""
    for source in file.sources:
        if match := re.search(r"-([0-9a-f]{8})\.pth$", source.url):
            assert source.sha256.startswith(match[1])


def test_released_files_bear_their_licence():
    released = {file.name: file for file in known_files() if file.kind == "upsnet"}
    assert released.keys() == RELEASED
    assert {file.licence for file in released.values()} == {"Uber Non-Commercial License"}
    assert all("Non-Commercial" in groups()[file.group] for file in released.values())


def test_what_recipes_start_from_is_there():
    recipes = (ROOT / "upsnet/experiments").glob("*.yaml")
    wanted = {(yaml.safe_load(path.read_text()).get("network") or {}).get("pretrained") for path in recipes} - {None}
    assert len(wanted) >= 3
    assert wanted <= {f"./model/{file.path}" for file in known_files()}


def test_conventions_are_found_by_name():
    assert known_file("resnet-50-caffe.pth").convention == "caffe"
    assert known_file("resnet101_msra-6cc46731.pth").convention == "caffe"
    assert known_file("resnet50-0676ba61.pth").convention == "torchvision"
    assert known_file("resnet50.pth") is None


def test_only_files_whose_every_content_is_known_are_pinned():
    pinned = {file.name for file in known_files() if file.is_pinned}
    assert pinned == {file.name for file in known_files() if file.group == "torchvision"}
