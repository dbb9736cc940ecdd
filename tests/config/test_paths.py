from datetime import datetime
from pathlib import Path

from upsnet.config import load_recipe, paths
from upsnet.dataset.image_sets import coco_image_sets

TIME = datetime(2024, 3, 7, 9, 5, 59)


def test_places_of_a_training():
    recipe = load_recipe("upsnet_resnet50_coco_16gpu")
    folder = Path("output/upsnet/coco/upsnet_resnet50_coco_16gpu/train2017")
    assert paths.training_folder(recipe) == folder
    assert paths.log_file(recipe, folder, TIME) == folder / "upsnet_resnet50_coco_16gpu_2024-03-07-09-05.log"
    assert paths.snapshot_file(recipe, 2000) == folder / "upsnet_resnet_50_coco_2000.pth"
    expected = Path("output/upsnet/coco/tensorboard/upsnet_resnet50_coco_16gpu/train2017/2024-03-07-09-05")
    assert paths.tensorboard_folder(recipe, TIME) == expected


def test_places_of_a_test():
    recipe = load_recipe("upsnet_resnet50_coco_16gpu")
    folder = Path("output/upsnet/coco/upsnet_resnet50_coco_16gpu/val2017")
    assert paths.testing_folder(recipe) == folder
    assert paths.results_folder(recipe) == folder / "results"


def test_several_image_sets_are_joined_by_an_underscore():
    recipe = load_recipe("upsnet_resnet50_coco_16gpu", ["dataset.image_set=train2014+valminusminival2014"])
    assert paths.training_folder(recipe).name == "train2014_valminusminival2014"
    assert paths.tensorboard_folder(recipe, TIME).parent.name == "train2014_valminusminival2014"
    recipe = load_recipe("upsnet_resnet50_coco_16gpu", ["dataset.test_image_set=a+b"])
    assert paths.testing_folder(recipe).name == "a_b"


def test_spaces_around_image_sets_do_not_count():
    """Places and reader speak of the same sets."""
    spaced = ["dataset.image_set= train + extra ", "dataset.test_image_set=a +b"]
    recipe = load_recipe("upsnet_resnet50_coco_16gpu", spaced)
    assert (recipe.dataset.image_set, recipe.dataset.test_image_set) == ("train+extra", "a+b")
    assert paths.training_folder(recipe).name == "train_extra" and paths.testing_folder(recipe).name == "a_b"
    files = coco_image_sets(Path("data"), recipe.dataset.image_set)
    assert [each.image_dir for each in files] == [Path("data/images/train"), Path("data/images/extra")]


def test_default_weights_lie_with_the_training_images():
    recipe = load_recipe("upsnet_resnet50_coco_16gpu", ["train.max_iteration=50"])
    assert paths.default_weights(recipe) == paths.snapshot_file(recipe, 50)
    recipe = load_recipe("upsnet_resnet50_coco_16gpu", ["test.test_iteration=0"])
    assert paths.default_weights(recipe) == paths.snapshot_file(recipe, 0)
