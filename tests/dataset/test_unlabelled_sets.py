"""Image sets without labels (COCO test-dev), and COCO's image sets by name."""

import pytest

from tests.miniature import CATEGORIES, edited, image_id_of, write_json, write_miniature
from upsnet import builders
from upsnet.config import load_recipe
from upsnet.dataset.coco_panoptic import CocoPanoptic
from upsnet.dataset.image_sets import ImageSet, UnlabelledImageSet, coco_image_sets
from upsnet.dataset.transforms import Transform
from upsnet.structures.categories import Categories
from upsnet.structures.class_tables import class_table
from upsnet.structures.errors import DataError

CLASSES = Categories.from_coco(CATEGORIES, "miniature")
TRANSFORM = Transform((60,), 200)


def write_unlabelled(folder, name="test-dev2017", photos_in="test2017", images=6):
    """The photos of a miniature with the json that COCO gives out for its test sets."""
    write_miniature(folder / "whole", "x", images)
    (folder / "images").mkdir(exist_ok=True)
    (folder / "whole/images/x").rename(folder / "images" / photos_in)
    with edited(folder / "whole/annotations/panoptic_x.json") as content:
        things = [{"id": c["id"], "name": c["name"], "supercategory": ""} for c in CATEGORIES if c["isthing"]]
        info = {"images": content["images"], "categories": things}
    write_json(folder / "annotations" / f"image_info_{name}.json", info)
    return folder


def open_unlabelled(folder, name="test-dev2017", **options):
    options = {"targets": False, "categories": CLASSES, **options}
    return CocoPanoptic(coco_image_sets(folder, name), TRANSFORM, **options)


def test_it_has_the_face_of_a_labelled_set(tmp_path):
    data_set = open_unlabelled(write_unlabelled(tmp_path))
    write_miniature(tmp_path / "same")
    labelled = CocoPanoptic(coco_image_sets(tmp_path / "same", "train"), TRANSFORM, targets=False)
    assert labelled.has_truth and not data_set.has_truth
    assert data_set.image_ids.tolist() == [image_id_of(i) for i in range(6)] == labelled.image_ids.tolist()
    assert data_set.categories == labelled.categories and len(data_set) == data_set.num_photos == 6
    assert data_set.file_names == labelled.file_names and data_set.padded_sizes() == labelled.padded_sizes()
    assert (data_set.sizes == labelled.sizes).all() and 0 < data_set.nbytes < labelled.nbytes
    for i in range(6):
        sample, other = data_set[i], labelled[i]
        assert (data_set.photo(i) == labelled.photo(i)).all() and sample.image.equal(other.image)
        assert sample.targets is None and sample.original_size == other.original_size


def test_limit_and_one_bad_photo(tmp_path):
    data_set = open_unlabelled(write_unlabelled(tmp_path), limit=2)
    assert data_set.num_photos == 2
    (tmp_path / "images/test2017" / data_set.file_names[1]).unlink()
    with pytest.raises(DataError, match=r"image 10: .*000000000010\.jpg: cannot be read"):
        data_set[1]


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"targets": True}, r"image_info_test-dev2017\.json: these photos have no labels to train"),
        ({"skip_without_things": True}, "these photos have no labels to train"),
        ({"categories": None}, "do not say which classes there are: .*dataset.dataset=coco"),
    ],
)
def test_what_is_asked_of_it_in_vain(options, sentence, tmp_path):
    with pytest.raises(DataError, match=sentence):
        open_unlabelled(write_unlabelled(tmp_path), **options)


def test_there_is_no_truth(tmp_path):
    data_set = open_unlabelled(write_unlabelled(tmp_path))
    with pytest.raises(DataError, match=r"image 24 has no labels: .*image_info_test-dev2017\.json lists photos only"):
        data_set.truth(3)


def test_sets_with_and_without_labels_do_not_go_together(tmp_path):
    write_unlabelled(write_miniature(tmp_path, "val2017"))
    for joined in ("val2017+test-dev2017", "test-dev2017+val2017"):
        with pytest.raises(DataError, match="one set has labels and the other has none"):
            open_unlabelled(tmp_path, joined)


def test_unlabelled_sets_are_joined(tmp_path):
    write_unlabelled(tmp_path / "a", "mine", "mine")
    write_unlabelled(tmp_path / "b", "test2017", images=3)
    with edited(tmp_path / "b/annotations/image_info_test2017.json") as content:
        for record in content["images"]:
            record["id"] += 1000
    sets = coco_image_sets(tmp_path / "a", "mine") + coco_image_sets(tmp_path / "b", "test2017")
    joined = CocoPanoptic(sets, TRANSFORM, targets=False, categories=CLASSES)
    assert joined.image_ids.tolist() == [3, 10, 17, 24, 31, 38, 1003, 1010, 1017]
    assert joined[7].image_id == 1010
    with pytest.raises(DataError, match="image id 3 is also used by"):
        open_unlabelled(tmp_path / "a", "mine+mine")


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda content: content["images"].clear(), "lists no images"),
        (lambda content: content["images"].append(content["images"][0]), "image id 38 occurs twice"),
        (lambda content: content["images"][0].pop("height"), "image 38 has no 'height'"),
    ],
)
def test_a_broken_list_of_photos(change, sentence, tmp_path):
    write_unlabelled(tmp_path)
    with edited(tmp_path / "annotations/image_info_test-dev2017.json") as content:
        change(content)
    with pytest.raises(DataError, match=sentence):
        open_unlabelled(tmp_path)


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, photos, without_labels",
    [
        ("train2014", "train2014", False),
        ("val2014", "val2014", False),
        ("minival2014", "val2014", False),
        ("valminusminival2014", "val2014", False),
        ("test2015", "test2015", True),
        ("test-dev2015", "test2015", True),
        ("train2017", "train2017", False),
        ("val2017", "val2017", False),
        ("test2017", "test2017", True),
        ("test-dev2017", "test2017", True),
        ("mine", "mine", False),
    ],
)
def test_names_of_image_sets(name, photos, without_labels, tmp_path, monkeypatch):
    monkeypatch.delenv("UPSNET_INDEX", raising=False)
    if "2014" in name:
        write_json(tmp_path / f"annotations/panoptic_{name}.json", {})
    (files,) = coco_image_sets(tmp_path, name)
    assert files.image_dir == tmp_path / "images" / photos
    if without_labels:
        assert files == UnlabelledImageSet(tmp_path / f"annotations/image_info_{name}.json", files.image_dir)
    else:
        annotations = tmp_path / "annotations"
        labels = annotations / f"panoptic_{name}"
        assert files == ImageSet(labels.with_suffix(".json"), labels, files.image_dir, None, tmp_path / ".upsnet_index")
    (tmp_path / f"coco_{photos}").mkdir()
    assert coco_image_sets(tmp_path, name)[0].image_dir == tmp_path / f"coco_{photos}"


def test_labels_are_used_where_there_are_some(tmp_path):
    """Whoever owns labels of a test set, or calls a set of his own like one, is scored."""
    write_miniature(tmp_path, "test2017")
    assert CocoPanoptic(coco_image_sets(tmp_path, "test2017")).has_truth


def test_a_photo_list_without_labels_makes_any_set_unlabelled(tmp_path):
    assert isinstance(coco_image_sets(write_unlabelled(tmp_path, "mine", "mine"), "mine")[0], UnlabelledImageSet)


def test_the_2014_sets_with_labels_of_ones_own(tmp_path):
    """Photos and instances as COCO gives them out, the panoptic json made by the user."""
    write_miniature(tmp_path, "minival2014", instances=True)
    (tmp_path / "images/minival2014").rename(tmp_path / "coco_val2014")
    assert CocoPanoptic(coco_image_sets(tmp_path, "minival2014"), TRANSFORM)[0].targets is not None


@pytest.mark.parametrize("name, same", [("minival2014", "val2017"), ("train2014", "train2017")])
def test_the_2014_sets_without_labels(name, same, tmp_path):
    with pytest.raises(DataError, match=rf"panoptic_{name}\.json.*{same}"):
        coco_image_sets(tmp_path, name)


# -- by recipe ---------------------------------------------------------------------------------------------------------


def recipe_of(folder, *overrides):
    sets = [f"dataset.dataset_path={folder}", "dataset.test_image_set=test-dev2017", "dataset.image_set=test-dev2017"]
    return load_recipe("upsnet_resnet50_coco_16gpu", [*sets, *overrides])


def test_a_recipe_tests_on_photos_without_labels(tmp_path):
    data_set = builders.build_test_set(recipe_of(write_unlabelled(tmp_path)))
    assert not data_set.has_truth and data_set.categories == class_table("coco") and data_set[0].targets is None


def test_a_recipe_neither_trains_nor_validates_on_them(tmp_path):
    recipe = recipe_of(write_unlabelled(tmp_path))
    with pytest.raises(DataError, match="no labels to train"):
        builders.build_training_set(recipe)
    with pytest.raises(DataError, match=r"train\.eval_data=false"):
        builders.build_test_set(recipe, targets=True)


def test_a_recipe_needs_known_classes_for_them(tmp_path):
    with pytest.raises(DataError, match=r"dataset\.dataset=coco"):
        builders.build_test_set(recipe_of(write_unlabelled(tmp_path), "dataset.dataset=panoptic"))
