"""`upsnet.load`, `Predictor` and `PanopticResult`: what a program that uses the package sees."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import upsnet
from tests.miniature import image_id_of
from upsnet.evaluation.coco_files import read_panoptic
from upsnet.structures.categories import Categories
from upsnet.structures.class_tables import class_table
from upsnet.structures.errors import DataError, PlaceError, RecipeError, WeightsError

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "network.fpn_feature_dim": 16, "network.fcn_feature_dim": 16, "network.rcnn_feature_dim": 32,
    "network.mask_feature_dim": 16, "test.scales": [48], "test.max_size": 64,
}  # fmt: skip
STUFF_HANDICAP = 4.0


@pytest.fixture(scope="module")
def predictor(tiny_run):
    """After two steps of training stuff would be everywhere; with less of it, things show as well."""
    predictor = upsnet.load(tiny_run.recipe, weights=tiny_run.weights, device="cpu")
    predictor.model.semantic_head.score.bias.data[:2] -= STUFF_HANDICAP
    return predictor


@pytest.fixture(scope="module")
def photos(tiny_run):
    """Lying, lying with void, upright, stuff only, things only, grey."""
    return [tiny_run.folder / f"data/images/val/{image_id_of(i):012d}.jpg" for i in range(6)]


def same(a, b):
    assert np.array_equal(a.segment_map, b.segment_map) and np.array_equal(a.semantic_map, b.semantic_map)
    assert [(s.id, s.category_id, s.area, s.bbox) for s in a.segments] == [
        (s.id, s.category_id, s.area, s.bbox) for s in b.segments
    ]
    assert np.allclose([s.score or 0 for s in a.segments], [s.score or 0 for s in b.segments], atol=1e-4)
    return True


# -- import ------------------------------------------------------------------------------------------------------------


def test_importing_the_package_does_not_wait_for_torch():
    code = "import sys, upsnet; assert 'torch' not in sys.modules, 'torch'; assert 'cv2' not in sys.modules, 'cv2'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_public_names():
    assert set(upsnet.__all__) == {"PanopticResult", "Predictor", "load", "operators"}
    assert all(hasattr(upsnet, name) for name in upsnet.__all__)
    assert callable(upsnet.operators.deform_conv2d) and callable(upsnet.operators.nms)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = upsnet.nonsense


# -- load --------------------------------------------------------------------------------------------------------------


def test_weights_bring_their_classes(predictor):
    assert [c.name for c in predictor.categories] == ["grass", "sky", "ball", "box", "kite"]
    assert isinstance(predictor.model, torch.nn.Module) and not predictor.model.training
    assert next(predictor.model.parameters()).device == torch.device("cpu")


def test_weights_need_no_data_set(tiny_run, predictor, photos):
    """A shipped recipe by its bare name, with what makes it the network of the weights."""
    overrides = SMALL | {
        "network.fcn_num_layers": 1, "dataset.dataset_path": "nowhere", "test.score_thresh": 0.0,
        "test.panoptic_score_thresh": 0.0, "test.max_det": 10, "test.panoptic_stuff_area_limit": 0,
    }  # fmt: skip
    other = upsnet.load("upsnet_resnet18_shapes", str(tiny_run.weights), overrides=overrides)
    other.model.load_state_dict(predictor.model.state_dict())
    assert same(other.predict(photos[0]), predictor.predict(photos[0]))


def test_overrides_as_text(tiny_run, photos):
    larger = upsnet.load(
        tiny_run.recipe, tiny_run.weights, torch.device("cpu"), ["test.scales=[96]", "test.max_size=128"]
    )
    assert larger.predict(photos[0]).segment_map.shape == (48, 64)


def test_without_weights_one_line_says_so(caplog):
    with caplog.at_level(logging.INFO, "upsnet"):
        predictor = upsnet.load("upsnet_resnet18_shapes", overrides=SMALL | {"dataset.dataset": "coco"})
    assert [record.getMessage() for record in caplog.records] == ["no weights given: the network is untrained"]
    assert len(predictor.categories) == 133
    again = upsnet.load("upsnet_resnet18_shapes", overrides=SMALL | {"dataset.dataset": "coco"})
    assert all(
        torch.equal(a, b) for a, b in zip(predictor.model.parameters(), again.model.parameters(), strict=True)
    ), "seeded"
    result = predictor.predict(np.zeros((40, 50, 3), np.uint8))
    assert {segment.category_id for segment in result.segments} <= {c.id for c in class_table("coco")}


def test_without_weights_the_backbone_may_be_pretrained(tiny_run, caplog):
    overrides = SMALL | {"dataset.dataset": "coco", "network.pretrained": str(tiny_run.weights)}
    with caplog.at_level(logging.INFO, "upsnet"):
        predictor = upsnet.load("upsnet_resnet18_shapes", overrides=overrides)
    assert any("backbone is pretrained" in record.getMessage() for record in caplog.records)
    trained = torch.load(tiny_run.weights, weights_only=True)["weights"]
    name = "backbone.res3.0.conv1.weight"
    assert torch.equal(predictor.model.state_dict()[name], trained[name])


def test_what_load_refuses(tiny_run):
    with pytest.raises(WeightsError, match="there is no weight file"):
        upsnet.load(tiny_run.recipe, "lost.pth")
    with pytest.raises(WeightsError, match="another network"):
        upsnet.load(tiny_run.recipe, tiny_run.weights, overrides={"network.mask_feature_dim": 24})
    with pytest.raises(RecipeError, match="nothing tells the classes"):
        upsnet.load(tiny_run.recipe, overrides={"dataset.dataset_path": "nowhere"})
    with pytest.raises(RecipeError, match=r"num_classes is 81.*class table of .*tiny_2.pth"):
        upsnet.load(tiny_run.recipe, tiny_run.weights, overrides={"dataset.num_classes": 81})


# -- predict -----------------------------------------------------------------------------------------------------------


def test_what_a_result_holds(predictor, photos):
    result = predictor.predict(str(photos[2]))
    assert isinstance(result, upsnet.PanopticResult)
    assert result.segment_map.shape == (64, 48) and result.segment_map.dtype == np.int32
    assert result.semantic_map.shape == (64, 48) and result.semantic_map.dtype == np.int16
    assert set(np.unique(result.semantic_map)) <= set(range(5))
    assert result.segments and {s.id for s in result.segments} == set(np.unique(result.segment_map)) - {0}
    for segment in result.segments:
        mask = result.segment_map == segment.id
        x, y, width, height = segment.bbox
        assert segment.area == mask.sum() == mask[y : y + height, x : x + width].sum()
        category = next(c for c in predictor.categories if c.id == segment.category_id)
        assert (segment.name, segment.is_thing) == (category.name, category.is_thing)
        assert (segment.score is None) != segment.is_thing and 0 <= (segment.score or 0) <= 1
    kinds = [segment.is_thing for segment in result.segments]
    assert kinds == sorted(kinds), "stuff first"
    boxes = result.instances.boxes
    assert 0 < len(result.instances) <= 10 and boxes.min() >= 0 and boxes[:, 2].max() < 48 and boxes[:, 3].max() < 64
    assert all(mask["size"] == [64, 48] for mask in result.instances.masks)


def test_things_are_found(predictor, photos):
    """Otherwise the tests of scores and boxes would test nothing."""
    assert any(segment.is_thing for result in predictor.predict(photos) for segment in result.segments)


def test_path_picture_and_array_are_the_same_photo(predictor, photos):
    with Image.open(photos[0]) as picture:
        pixels = cv2.cvtColor(cv2.imread(str(photos[0])), cv2.COLOR_BGR2RGB)
        of_array = predictor.predict(pixels)
        assert same(predictor.predict(photos[0]), of_array)
        assert same(predictor.predict(Image.fromarray(pixels)), of_array)
        assert predictor.predict(picture).segment_map.shape == (48, 64)
    assert same(predictor.predict(pixels[:, :, ::-1].copy()[:, :, ::-1]), of_array), "a view with negative steps"
    pixels.flags.writeable = False
    assert same(predictor.predict(pixels), of_array)


def test_a_mixed_list_gives_the_same_as_one_at_a_time(predictor, photos):
    with Image.open(photos[0]) as lying, Image.open(photos[4]) as things:
        photos = [*photos, lying.resize((64, 24)), things.resize((25, 60))]
    alone = [predictor.predict(photo) for photo in photos]
    for order in (range(8), (6, 5, 2, 7, 0, 4, 3, 1)):
        together = predictor.predict([photos[i] for i in order])
        assert len(together) == 8 and all(same(t, alone[i]) for t, i in zip(together, order, strict=True))
    assert predictor.predict([]) == []


def test_a_photo_is_turned_as_exif_says(predictor, photos, tmp_path):
    upright = Image.open(photos[2]).convert("RGB")
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by 90°
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    lying.save(tmp_path / "lying.jpg", exif=exif, quality=100, subsampling=0)
    expected = predictor.predict(tmp_path / "upright.png")
    for photo in (tmp_path / "lying.jpg", Image.open(tmp_path / "lying.jpg")):
        result = predictor.predict(photo)
        assert result.segment_map.shape == (64, 48) and result.photo.shape == (64, 48, 3)
        assert (result.semantic_map == expected.semantic_map).mean() > 0.9


@pytest.mark.parametrize(
    "mode, name", [("L", "grey.png"), ("RGBA", "alpha.png"), ("CMYK", "print.jpg"), ("P", "few.png")]
)
def test_photos_of_other_kinds(predictor, photos, tmp_path, mode, name):
    with Image.open(photos[0]) as photo:
        other = photo.convert(mode)
    other.save(tmp_path / name)
    of_file, of_picture = predictor.predict(tmp_path / name), predictor.predict(other)
    assert of_file.photo.shape == of_picture.photo.shape == (48, 64, 3)
    difference = np.abs(of_file.photo.astype(int) - of_picture.photo.astype(int))
    assert difference.mean() < 8, "the two readers see about the same photo"
    assert of_file.segment_map.shape == (48, 64)


def test_only_what_is_asked_for(predictor, photos, tmp_path):
    whole = predictor.predict(photos[0])
    panoptic, instances = (predictor.predict(photos[0], outputs=(name,)) for name in ("panoptic", "instances"))
    assert panoptic.instances is None and panoptic.semantic_map is None
    assert np.array_equal(panoptic.segment_map, whole.segment_map) and panoptic.segments == whole.segments
    panoptic.save(tmp_path / "panoptic")
    assert panoptic.draw().shape[2] == 3
    assert instances.segment_map is None and np.array_equal(instances.instances.boxes, whole.instances.boxes)
    sentence = r"no panoptic map: ask for it, predict\(photo, outputs=\('panoptic', ...\)\)"
    for use in (instances.draw, lambda: instances.save(tmp_path / "lost"), lambda: instances.segments):
        with pytest.raises(DataError, match=sentence):
            use()
    assert {path.name for path in tmp_path.iterdir()} == {"panoptic.png", "panoptic.json"}
    both = predictor.predict([photos[0], photos[1]], outputs=["semantic", "panoptic"])
    assert np.array_equal(both[0].semantic_map, whole.semantic_map) and both[1].instances is None
    assert predictor.predict(photos[0], outputs="semantic").segment_map is None


@pytest.mark.parametrize("outputs", [("panoptic", "boxes"), ("Panoptic",), (), "boxes", ("panoptic", "")], ids=str)
def test_unknown_outputs_are_refused(predictor, photos, outputs):
    with pytest.raises(
        DataError, match=r"outputs: '(boxes|Panoptic|nothing|)' is none of instances, panoptic, semantic"
    ):
        predictor.predict(photos[0], outputs=outputs)


def test_weights_that_are_loaded_later_count(tiny_run, photos):
    predictor = upsnet.load(tiny_run.recipe, weights=tiny_run.weights, device="cpu")
    state = {name: value.clone() for name, value in predictor.model.state_dict().items()}
    before = predictor.predict(photos[0])
    assert predictor.prepared is predictor.prepared, "made once"
    sky = predictor.model.semantic_head.score.bias[1]
    with torch.no_grad():
        sky += 100
        predictor.model.backbone.res2[0].conv1.weight.zero_()
    changed = predictor.predict(photos[0])
    assert (changed.semantic_map == 1).all() and not (before.semantic_map == 1).all()
    predictor.model.load_state_dict(state)
    assert same(predictor.predict(photos[0]), before)


@torch.inference_mode()
def test_loaded_in_inference_mode(tiny_run, predictor, photos):
    within = upsnet.load(tiny_run.recipe, weights=tiny_run.weights, device="cpu")
    within.model.load_state_dict(predictor.model.state_dict())
    assert same(within.predict(photos[0]), predictor.predict(photos[0]))


def test_the_model_keeps_its_names_and_can_be_trained(tiny_run, photos):
    predictor = upsnet.load(tiny_run.recipe, weights=tiny_run.weights, device="cpu")
    predictor.predict(photos[0])
    trained = torch.load(tiny_run.weights, weights_only=True)["weights"]
    state = predictor.model.state_dict()
    assert trained.keys() == state.keys() and all(torch.equal(trained[name], state[name]) for name in state)
    assert any(parameter.requires_grad for parameter in predictor.model.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_precision(tiny_run, predictor, photos, precision):
    other = upsnet.load(tiny_run.recipe, tiny_run.weights, "cpu", {"test.precision": precision})
    other.model.load_state_dict(predictor.model.state_dict())
    is_half = precision == "bf16"
    assert other.prepared.backbone.stem.conv.weight.dtype == (torch.bfloat16 if is_half else torch.float32)
    assert other.model.backbone.stem.conv.weight.dtype == torch.float32
    agreement = [
        (a.semantic_map == b.semantic_map).mean()
        for a, b in zip(other.predict(photos), predictor.predict(photos), strict=True)
    ]
    assert np.mean(agreement) > (0.97 if is_half else 0.9999)


@pytest.mark.parametrize(
    "photo, fragment",
    [
        (np.zeros((40, 50), np.uint8), r"H×W×3 uint8 RGB, not uint8 of shape \(40, 50\)"),
        (np.zeros((40, 50, 4), np.uint8), r"\(40, 50, 4\)"),
        (np.zeros((40, 50, 3), np.float32), "float32"),
        (np.zeros((0, 50, 3), np.uint8), r"\(0, 50, 3\)"),
        (np.zeros((2, 40, 50, 3), np.uint8), "give a list|shape"),
        (torch.zeros(40, 50, 3, dtype=torch.uint8), "not Tensor"),
        (("a.jpg", "b.jpg"), "not tuple"),
        (None, "not NoneType"),
        (np.zeros((1, 5000, 3), np.uint8), "long and thin"),
        ("lost.jpg", "lost.jpg: cannot be read"),
    ],
)
def test_what_is_no_photo(predictor, photos, photo, fragment):
    with pytest.raises(DataError, match=fragment):
        predictor.predict(photo)
    with pytest.raises(DataError, match=fragment):
        predictor.predict([photos[0], photo])


def test_a_truncated_picture(predictor, photos, tmp_path):
    path = tmp_path / "cut.jpg"
    path.write_bytes(photos[0].read_bytes()[:700])
    with pytest.raises(DataError, match="cut off"):
        predictor.predict(path)
    with Image.open(path) as picture, pytest.raises(DataError, match="truncated"):
        predictor.predict(picture)


# -- results -----------------------------------------------------------------------------------------------------------


def test_saved_results_are_panoptic_files(predictor, photos, tmp_path):
    result = predictor.predict(photos[1])
    result.save(tmp_path / "new" / "street.no.1")
    png, record = (tmp_path / "new" / f"street.no.1{ending}" for ending in (".png", ".json"))
    assert sorted((tmp_path / "new").iterdir()) == [record, png]
    content = json.loads(record.read_text())
    assert content["images"] == [{"id": 1, "file_name": photos[1].name, "height": 48, "width": 64}]
    assert Categories.from_coco(content["categories"], "saved") == predictor.categories
    (annotation,) = content["annotations"]
    assert annotation["image_id"] == 1 and annotation["file_name"] == png.name
    red, green, blue = (np.asarray(Image.open(png))[..., i].astype(int) for i in range(3))
    assert np.array_equal(red + 256 * green + 65536 * blue, result.segment_map)
    for info, segment in zip(annotation["segments_info"], result.segments, strict=True):
        assert (info["id"], info["category_id"], info["area"], info["iscrowd"]) == (
            segment.id, segment.category_id, segment.area, 0,
        )  # fmt: skip
        assert tuple(info["bbox"]) == segment.bbox and info.get("score") == segment.score
    folder = record.with_suffix("")
    folder.mkdir()
    png.rename(folder / png.name)
    segment_map, _ = read_panoptic(annotation, record, predictor.categories)
    assert np.array_equal(segment_map, result.segment_map)


def test_a_result_that_cannot_be_saved(predictor, photos, tmp_path):
    (tmp_path / "wall").write_text("")
    with pytest.raises(PlaceError, match="wall"):
        predictor.predict(photos[0]).save(tmp_path / "wall" / "street")


def test_a_result_can_be_drawn(predictor, photos):
    result = predictor.predict(photos[0])
    drawn = result.draw()
    assert drawn.dtype == np.uint8 and drawn.ndim == 3 and drawn.shape[2] == 3
    assert drawn.shape[0] / drawn.shape[1] == pytest.approx(48 / 64, rel=0.05)
    plain = result.draw(names=False)
    assert plain.shape == drawn.shape and not np.array_equal(plain, drawn)


# -- the class table of COCO -------------------------------------------------------------------------------------------


def test_the_classes_of_coco_in_the_order_of_the_original():
    table = class_table("coco")
    assert (table.num_stuff, table.num_things, table.num_classes, table.num_seg_classes) == (53, 80, 81, 133)
    expected = {
        0: "banner", 1: "blanket", 6: "door-stuff", 10: "gravel", 19: "river", 20: "road", 30: "wall-stone",
        39: "sky-other-merged", 40: "cabinet-merged", 50: "rock-merged", 51: "wall-other-merged", 52: "rug-merged",
        53: "person", 54: "bicycle", 55: "car", 132: "toothbrush",
    }  # fmt: skip
    assert {position: table[position].name for position in expected} == expected
    assert [table[position].id for position in (0, 20, 52, 53, 132)] == [92, 149, 200, 1, 90]
    stuff, things = list(table)[:53], list(table)[53:]
    assert [c.id for c in stuff] == sorted(c.id for c in stuff) and [c.id for c in things] == sorted(
        c.id for c in things
    )
    assert len({c.name for c in table}) == len({c.color for c in table}) == 133
    assert class_table("COCO") == table and class_table("panoptic") is None


def test_the_classes_of_coco_are_those_of_its_files(shared):
    path = shared("data/coco_mini") / "annotations/panoptic_val2017.json"
    assert Categories.from_coco(json.loads(path.read_text())["categories"], path.name) == class_table("coco")
