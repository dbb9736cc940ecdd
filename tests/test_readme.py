"""The README's recipe for one's own data works as it stands there; links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch
import torchvision
import yaml

from tests.miniature import write_miniature
from tests.tiny import upsnet

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
SMALLER = (
    "symbol=resnet_18_upsnet", "dataset.num_workers=0", "train.max_iteration=1",
    "train.scales=[48]", "train.max_size=64", "train.eval_data=true", "network.fpn_feature_dim=32",
    "network.fcn_feature_dim=32", "network.rcnn_feature_dim=32", "network.mask_feature_dim=32",
    "train.rpn_post_nms_top_n=50", "train.batch_rois=32",
)  # fmt: skip


@pytest.fixture(scope="module")
def recipe_text():
    found = re.search(r"<!-- own-data -->\s*```yaml\n(.*?)```\s*<!-- /own-data -->", README.read_text(), re.DOTALL)
    assert found, "the README has no yaml block between the markers <!-- own-data --> and <!-- /own-data -->"
    return found[1]


def test_the_recipe_is_short(recipe_text):
    assert len([line for line in recipe_text.splitlines() if line.strip()]) == 6


def test_the_recipe_trains_on_a_set_with_odd_ids(recipe_text, tmp_path):
    """Category ids with gaps and out of order, image ids with gaps, segment ids of three bytes, own set names."""
    recipe, named = tmp_path / "mine.yaml", yaml.safe_load(recipe_text)["dataset"]
    recipe.write_text(recipe_text)
    torch.save(torchvision.models.resnet18().half().state_dict(), tmp_path / "resnet18.pth")
    changes = (
        f"dataset.dataset_path={tmp_path}/photos", f"output_path={tmp_path}/out",
        f"network.pretrained={tmp_path}/resnet18.pth", "network.pretrained_convention=torchvision",
        "network.use_caffe_model=false", *SMALLER,
    )  # fmt: skip
    for image_set in (named["image_set"], named["test_image_set"]):
        write_miniature(tmp_path / "photos", image_set)
    ran = upsnet("train", "--cfg", recipe, *changes)
    assert ran.code == 0, ran.err
    assert "3 thing and 2 stuff classes" in ran.err
    assert "loaded: backbone (100)" in ran.err and "of another" not in ran.err
    assert list((tmp_path / "out/mine").rglob("*_1.pth"))
    tested = upsnet("test", "--cfg", recipe, *changes, "test.scales=[48]", "test.max_size=64")
    assert tested.code == 0 and "All" in tested.out, tested.err


def test_without_pretrained_weights_the_message_says_what_to_do(recipe_text, tmp_path, monkeypatch):
    """Where the base recipe looks for a ResNet-50, a fresh checkout has none."""
    recipe, named = tmp_path / "mine.yaml", yaml.safe_load(recipe_text)["dataset"]
    recipe.write_text(recipe_text)
    for image_set in (named["image_set"], named["test_image_set"]):
        write_miniature(tmp_path / named["dataset_path"], image_set)
    monkeypatch.chdir(tmp_path)
    ran = upsnet("train", "--cfg", recipe, "dataset.num_workers=0")
    assert ran.code == 2 and "run ./download_weights.sh imagenet, or train from scratch" in ran.errors[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_images_are_there(page):
    """Those to files of the repository; `#part` of a page is not looked at."""
    links = re.findall(r"\]\(([^)\s]+)[^)]*\)|(?:src|href)=\"([^\"]+)\"", page.read_text(encoding="utf-8"))
    targets = [target for pair in links for target in pair if target and not re.match(r"https?:|mailto:|#", target)]
    missing = [target for target in targets if not (page.parent / target.partition("#")[0]).exists()]
    assert not missing, f"{page.name} names what is not there: {', '.join(missing)}"
