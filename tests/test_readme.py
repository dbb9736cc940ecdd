"""The README's recipe for one's own data works as it stands there."""

import re
from pathlib import Path

import pytest
import yaml

from tests.miniature import write_miniature
from tests.tiny import upsnet

README = Path(__file__).resolve().parent.parent / "README.md"
SMALLER = (
    "symbol=resnet_18_upsnet", "network.pretrained=null", "dataset.num_workers=0", "train.max_iteration=1",
    "train.scales=[48]", "train.max_size=64", "train.eval_data=true", "network.fpn_feature_dim=32",
    "network.fcn_feature_dim=32", "network.rcnn_feature_dim=32", "network.mask_feature_dim=32",
    "network.backbone_freeze_at=0", "train.rpn_post_nms_top_n=50", "train.batch_rois=32",
)  # fmt: skip


@pytest.fixture(scope="module")
def recipe_text():
    if not README.exists():
        pytest.skip("README.md is not written yet")
    found = re.search(r"<!-- own-data -->\s*```yaml\n(.*?)```\s*<!-- /own-data -->", README.read_text(), re.DOTALL)
    assert found, "the README has no yaml block between the markers <!-- own-data --> and <!-- /own-data -->"
    return found[1]


def test_the_recipe_is_short(recipe_text):
    assert len([line for line in recipe_text.splitlines() if line.strip()]) == 6


def test_the_recipe_trains_on_a_set_with_odd_ids(recipe_text, tmp_path):
    """Category ids with gaps and out of order, image ids with gaps, segment ids of three bytes, own set names."""
    recipe, named = tmp_path / "mine.yaml", yaml.safe_load(recipe_text)["dataset"]
    recipe.write_text(recipe_text)
    for image_set in (named["image_set"], named["test_image_set"]):
        write_miniature(tmp_path / "photos", image_set)
    ran = upsnet(
        "train", "--cfg", recipe, f"dataset.dataset_path={tmp_path}/photos", f"output_path={tmp_path}/out", *SMALLER
    )
    assert ran.code == 0, ran.err
    assert "3 thing and 2 stuff classes" in ran.err and "of another" not in ran.err
    assert list((tmp_path / "out/mine").rglob("*_1.pth"))
    tested = upsnet(
        "test", "--cfg", recipe, f"dataset.dataset_path={tmp_path}/photos", f"output_path={tmp_path}/out", *SMALLER,
        "test.scales=[48]", "test.max_size=64",
    )  # fmt: skip
    assert tested.code == 0 and "All" in tested.out, tested.err
