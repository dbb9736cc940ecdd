"""Does it learn? The demo's recipe on a small shapes set, and the COCO recipe on real photos. Minutes each."""

from pathlib import Path

import pytest

from upsnet import commands
from upsnet.config import load_recipe, paths
from upsnet.dataset.shapes import write_shapes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]  # a crowded machine takes long


def test_the_demo_recipe_learns_stuff_and_things(tmp_path: Path) -> None:
    """Little more than half of the demo's steps reach the floors that the demo has to reach."""
    write_shapes(tmp_path / "shapes", train=600, val=40, seed=3)
    recipe = load_recipe(
        "upsnet_resnet18_shapes",
        [f"dataset.dataset_path={tmp_path / 'shapes'}", f"output_path={tmp_path / 'out'}", "train.max_iteration=250"],
    )
    weights = commands.train(recipe)
    panoptic = commands.test(recipe, weights)["panoptic"]
    assert panoptic["stuff"]["pq"] >= 65
    assert panoptic["things"]["pq"] >= 20
    page = commands.report(recipe)
    assert page.stat().st_size > 100_000


def test_the_coco_recipe_trains_on_real_photos_from_real_weights(tmp_path: Path, shared) -> None:
    weights = shared("data/resnet50_imagenet") / "resnet50_caffe_imagenet_fp16.pth"
    recipe = load_recipe(
        "upsnet_resnet50_coco_16gpu",
        [
            f"dataset.dataset_path={shared('data/coco_mini')}",
            f"network.pretrained={weights}",
            "network.pretrained_convention=caffe",
            f"output_path={tmp_path}",
            "dataset.limit=4",
            "dataset.num_workers=0",
            "train.scales=[192]",
            "test.scales=[192]",
            "train.total_batch=2",
            "train.max_iteration=2",
            "train.decay_iteration=[]",
            "train.display_iter=1",
        ],
    )
    summary = commands.test(recipe, commands.train(recipe))
    assert summary["panoptic"]["all"]["n"] > 0
    assert summary["box"]["ap"] is not None and summary["mask"]["ap"] is not None
    assert (paths.training_folder(recipe) / "first_batch.png").is_file()
    # The stored results give the same scores again.
    assert commands.test(recipe, eval_only=True) == summary
