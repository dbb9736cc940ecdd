import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.miniature import edited, image_id_of, write_miniature
from upsnet.evaluation.panoptic_files import evaluate_files
from upsnet.evaluation.panoptic_quality import PanopticQuality
from upsnet.evaluation.semantic_iou import SemanticIoU
from upsnet.structures.categories import Categories, Category
from upsnet.structures.errors import DataError, UserError
from upsnet.structures.results import Prediction, Truth

FIRST = image_id_of(0)


@pytest.fixture
def files(tmp_path):
    """Truth and a perfect prediction: the truth without its crowd."""
    truth = write_miniature(tmp_path) / "annotations" / "panoptic_train.json"
    prediction = tmp_path / "predictions" / "panoptic.json"
    shutil.copytree(truth.with_suffix(""), prediction.with_suffix(""))
    shutil.copy(truth, prediction)
    with edited(prediction) as content:
        del content["categories"], content["images"]
        for record in content["annotations"]:
            crowds = [s["id"] for s in record["segments_info"] if s["iscrowd"]]
            record["segments_info"] = [
                {"id": s["id"], "category_id": s["category_id"]} for s in record["segments_info"] if not s["iscrowd"]
            ]
            repaint(prediction, record, crowds, 0)
    return prediction, truth


def repaint(path, record, ids, new_id):
    png = path.with_suffix("") / record["file_name"]
    pixels = np.asarray(Image.open(png)).copy()
    numbers = pixels.astype(np.int64) @ [1, 256, 65536]
    pixels[np.isin(numbers, ids)] = [new_id & 255, new_id >> 8 & 255, new_id >> 16]
    Image.fromarray(pixels).save(png)


def test_truth_as_prediction(files):
    prediction, truth = files
    summary = evaluate_files(prediction, truth)
    for group in ("all", "things", "stuff"):
        assert summary["panoptic"][group]["pq"] == 100.0
    assert sum(row["tp"] for row in summary["panoptic"]["per_class"]) == 20


def test_order_of_the_files_and_further_images_do_not_matter(files, caplog):
    prediction, truth = files
    with edited(prediction) as content:
        content["annotations"].reverse()
    with edited(truth) as content:
        del content["annotations"][1]
    assert evaluate_files(prediction, truth)["panoptic"]["all"]["pq"] == 100.0
    assert "1 images are not in panoptic_train.json" in caplog.text


def test_a_changed_class_costs(files):
    prediction, truth = files
    with edited(prediction) as content:
        content["annotations"][0]["segments_info"][0]["category_id"] = 200
    summary = evaluate_files(prediction, truth)["panoptic"]
    by_id = {row["category_id"]: row for row in summary["per_class"]}
    assert by_id[200]["fp"] == 1 and by_id[7]["fn"] == 1 and summary["things"]["pq"] == 100.0


def test_any_number_of_workers_gives_the_same_to_the_last_bit(files):
    prediction, truth = files
    for path in files:  # more photos than the workers take at once
        with edited(path) as content:
            first = content["annotations"]
            content["annotations"] = [
                {**record, "image_id": 100 * i + record["image_id"]} for i in range(9) for record in first
            ]
    for png in prediction.with_suffix("").iterdir():
        Image.fromarray(np.roll(np.asarray(Image.open(png)), 3, axis=1)).save(png)
    alone = evaluate_files(prediction, truth, boundary=True)
    assert 0 < alone["boundary"]["all"]["pq"] < alone["panoptic"]["all"]["pq"] < 100
    for workers in (2, 3, None):
        assert evaluate_files(prediction, truth, boundary=True, workers=workers) == alone


def test_an_error_in_a_worker_is_the_same_sentence(files):
    prediction, truth = files
    png_of(prediction).unlink()
    sentences = []
    for workers in (1, 2):
        with pytest.raises(DataError) as caught:
            evaluate_files(prediction, truth, workers=workers)
        sentences.append(str(caught.value))
    assert sentences[0] == sentences[1] and f"image {FIRST}" in sentences[0] and "\n" not in sentences[0]


def test_boundary_quality_of_a_perfect_prediction(files):
    summary = evaluate_files(*files, boundary=True)
    assert summary.keys() == {"panoptic", "boundary"} and summary["boundary"] == summary["panoptic"]


@pytest.mark.parametrize(
    "name",
    ["data/coco_mini/annotations/panoptic_val2017.json", "data/eval_cases/panopticapi_sample/panoptic_examples.json"],
)
def test_real_files_against_themselves(shared, name):
    """Their areas fit; crowds given as predictions are ignored."""
    path = shared(name)
    summary = evaluate_files(path, path, boundary=True, workers=None)
    for kind in ("panoptic", "boundary"):
        assert [summary[kind][group]["pq"] for group in ("all", "things", "stuff")] == [100.0] * 3
    crowds = [s["iscrowd"] for record in json.loads(path.read_text())["annotations"] for s in record["segments_info"]]
    assert sum(row["tp"] for row in summary["panoptic"]["per_class"]) == crowds.count(0)
    assert evaluate_files(path, path, official=True)["panoptic"] == summary["panoptic"]


# -- a truth that contradicts itself -----------------------------------------------------------------------------------


def test_a_halved_area_is_refused_and_officially_believed(files):
    prediction, truth = files
    with edited(truth) as content:
        segment = next(s for s in content["annotations"][0]["segments_info"] if s["area"] % 2 == 0)
        area, segment["area"] = segment["area"], segment["area"] // 2
    with pytest.raises(DataError) as caught:
        evaluate_files(prediction, truth)
    assert str(caught.value).startswith(
        f"{truth}: image {FIRST}, segment {segment['id']}: 'area' says {area // 2}, but {area} pixels of the PNG have"
    )
    rows = evaluate_files(prediction, truth, official=True)["panoptic"]["per_class"]
    row = next(row for row in rows if row["category_id"] == segment["category_id"])
    assert row["sq"] * row["tp"] == pytest.approx(100 * (row["tp"] + 1)), "one IoU of 2, the others 1"


def test_a_wrong_area_of_a_prediction_means_nothing(files):
    """The official tool counts it anew, and many write none."""
    prediction, truth = files
    with edited(prediction) as content:
        content["annotations"][0]["segments_info"][0]["area"] = 1
    for official in (False, True):
        assert evaluate_files(prediction, truth, official=official)["panoptic"]["all"]["pq"] == 100.0


def test_a_truth_without_areas_is_counted_but_cannot_be_believed(files):
    prediction, truth = files
    with edited(truth) as content:
        del content["annotations"][0]["segments_info"][0]["area"]
    assert evaluate_files(prediction, truth)["panoptic"]["all"]["pq"] == 100.0
    with pytest.raises(DataError, match=rf"image {FIRST}, segment \d+: has no 'area', which --official believes"):
        evaluate_files(prediction, truth, official=True)


def test_unknown_ids_of_the_truth_are_refused_and_officially_nothing(files):
    """A segment without record or with an unknown class: its pixels are no void, so its prediction is invented."""
    prediction, truth = files
    before = sum(row["tp"] for row in evaluate_files(prediction, truth)["panoptic"]["per_class"])

    def check(words):
        with pytest.raises(DataError, match=words):
            evaluate_files(prediction, truth)
        rows = evaluate_files(prediction, truth, official=True)["panoptic"]["per_class"]
        assert [sum(row[key] for row in rows) for key in ("tp", "fp", "fn")] == [before - 1, 1, 0]

    with edited(truth) as content:
        content["annotations"][0]["segments_info"][0]["category_id"] = 8
    check("category 8 is not in the class table")
    with edited(truth) as content:
        del content["annotations"][0]["segments_info"][0]
    check("the map holds this id but no record")


def test_a_truth_without_pixels_is_refused_and_officially_missed(files):
    prediction, truth = files
    with edited(truth) as content:
        segments = content["annotations"][0]["segments_info"]
        segments.append({**segments[0], "id": 77})
    with pytest.raises(DataError, match="truth segment 77: no pixel"):
        evaluate_files(prediction, truth)
    rows = evaluate_files(prediction, truth, official=True)["panoptic"]["per_class"]
    assert sum(row["fn"] for row in rows) == 1 and sum(row["fp"] for row in rows) == 0


@pytest.mark.parametrize("change", [lambda s: s.update(id=77), lambda s: s.update(category_id=8)])
def test_contradictions_of_the_prediction_are_always_refused(files, change):
    first_segment(change)(files[0])
    for official in (False, True):
        with pytest.raises(DataError):
            evaluate_files(*files, official=official)


# -- memory ------------------------------------------------------------------------------------------------------------


def resident():
    """MiB of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell resident memory")
@pytest.mark.parametrize("workers", [1, 2])
def test_memory_does_not_grow_with_two_thousand_images(tmp_path, monkeypatch, workers):
    """Maps of 160×200, so that keeping one of each image would cost 250 MiB; the PNGs are the same for all."""
    truth, prediction = (tmp_path / name / "panoptic.json" for name in ("truth", "prediction"))
    records = json.loads((write_miniature(tmp_path, size=(160, 200)) / "annotations/panoptic_train.json").read_text())
    crowdless = [r for r in records["annotations"] if not any(s["iscrowd"] for s in r["segments_info"])]
    many = [{**crowdless[i % len(crowdless)], "image_id": i} for i in range(2000)]
    for path in (truth, prediction):
        shutil.copytree(tmp_path / "annotations/panoptic_train", path.with_suffix(""))
        path.write_text(json.dumps({"categories": records["categories"], "annotations": many}))
    sizes = []
    add = PanopticQuality.add_matching
    monkeypatch.setattr(PanopticQuality, "add_matching", lambda self, m: (add(self, m), sizes.append(resident())))
    assert evaluate_files(prediction, truth, workers=workers)["panoptic"]["all"]["pq"] == 100.0
    assert len(sizes) == 2000 and max(sizes) - sizes[50] < 50


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell resident memory")
def test_memory_of_the_semantic_score_does_not_grow(tmp_path):
    categories = Categories([Category(i, str(i), False, (0, 0, 0)) for i in range(150)])
    draws = np.random.default_rng(0)
    iou, sizes = SemanticIoU(categories), []
    for i in range(2000):
        truth, prediction = draws.integers(0, 150, (2, 120, 160)).astype(np.int16)
        nothing = np.zeros(truth.shape, np.int32)
        iou.add(Prediction(i, "a.jpg", semantic_map=prediction), Truth(i, "a.jpg", nothing, [], truth))
        sizes.append(resident())
    assert max(sizes) - sizes[50] < 50


# -- what is refused ---------------------------------------------------------------------------------------------------


def first_record(change):
    def damage(path):
        with edited(path) as content:
            change(content["annotations"][0])

    return damage


def first_segment(change):
    return first_record(lambda record: change(record["segments_info"][0]))


def drop_image(path):
    with edited(path) as content:
        del content["annotations"][0]


def double_image(path):
    with edited(path) as content:
        content["annotations"].append(content["annotations"][0])


def no_annotations(path):
    path.write_text("{}")


def png_of(path):
    return path.with_suffix("") / f"{FIRST:012d}.png"


def png(change):
    return lambda path: change(png_of(path))


def crop(path):
    Image.open(path).crop((0, 0, 20, 20)).save(path)


def extra_pixels(path):
    with Image.open(path) as picture:
        picture.putpixel((0, 0), (9, 9, 9))
        picture.save(path)


DAMAGES = [
    (png(lambda path: path.unlink()), rf"image {FIRST}: .*No such file"),
    (png(lambda path: path.write_bytes(path.read_bytes()[:200])), rf"image {FIRST}: .*cut off"),
    (png(lambda path: path.write_text("x")), rf"image {FIRST}: .*is not an 8-bit RGB PNG"),
    (png(lambda path: Image.open(path).convert("L").save(path)), rf"image {FIRST}: .*is not an 8-bit RGB PNG"),
    (png(crop), f"image {FIRST}: the prediction has .* pixels"),
    (png(extra_pixels), rf"image {FIRST}, \w+ segment 592137: the map holds this id but no record"),
    (first_segment(lambda s: s.update(id=77)), rf"image {FIRST}, \w+ segment 77: no pixel"),
    (first_segment(lambda s: s.update(category_id=8)), f"image {FIRST}, segment 41: category 8 is not in the class"),
    (first_segment(lambda s: s.pop("category_id")), f"image {FIRST}, segment 41: has no 'category_id'"),
    (first_segment(lambda s: s.pop("id")), f"image {FIRST}, segment without id: has no 'id'"),
    (first_segment(lambda s: s.update(bbox=[1])), f"image {FIRST}, segment 41: 'bbox' must be"),
    (first_record(lambda r: r["segments_info"].append(r["segments_info"][0])), f"image {FIRST}, .* two segments"),
    (first_record(lambda r: r.pop("segments_info")), f"annotation of image {FIRST} has no 'segments_info'"),
    (first_record(lambda r: r.pop("image_id")), "annotation number 0 has no 'image_id'"),
    (first_record(lambda r: r.update(image_id=[3])), r"annotation of image \[3\] has \[3\] as 'image_id': mend"),
    (first_record(lambda r: r.update(file_name=None)), f"annotation of image {FIRST} has null as 'file_name': mend"),
    (first_record(lambda r: r.update(segments_info=7)), f"annotation of image {FIRST} has 7 as 'segments_info': mend"),
    (first_record(lambda r: r.update(segments_info=[7])), f"image {FIRST}, segment without id: is no object"),
    (first_segment(lambda s: s.update(id="41")), f"image {FIRST}, segment 41: has \"41\" as 'id': mend"),
    (first_segment(lambda s: s.update(category_id={})), f"image {FIRST}, segment 41: has {{}} as 'category_id': mend"),
    (double_image, f"image {FIRST} has two annotations"),
    (no_annotations, "has no"),
    (first_record(lambda r: r.update(category_id=3) or r.pop("segments_info")), "holds instances .*, not panoptic"),
    (lambda path: path.write_text('{"categories": [], "annotations": [3]}'), "annotation number 0 is no object"),
    (lambda path: path.write_text("[]"), "is a list, as detections are, not an object: give a COCO panoptic file"),
    (lambda path: path.write_text("3"), "is a int, not an object"),
    (lambda path: path.write_text('{"annot'), "is not valid json"),
    (lambda path: path.unlink(), "there is no such file: check the path"),
    (lambda path: shutil.rmtree(path.with_suffix("")), "there is no such folder: the PNGs of"),
]


@pytest.mark.parametrize("side", ["prediction", "truth"])
@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_refusals(files, side, damage, words):
    prediction, truth = files
    damage(prediction if side == "prediction" else truth)
    with pytest.raises(UserError, match=words) as caught:
        evaluate_files(prediction, truth)
    assert "\n" not in str(caught.value)


def test_other_json_files_are_named_for_what_they_are(files, tmp_path):
    """Detections and instances, as prediction and as truth; before anything is said about folders."""
    folder = write_miniature(tmp_path / "more", instances=True) / "annotations"
    detections = tmp_path / "bbox_results.json"
    detections.write_text('[{"image_id": 3, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 1}]')
    for other, words in ((detections, "is a list, as detections are"), (folder / "instances_train.json", "holds inst")):
        for pair in ((other, files[1]), (files[0], other)):
            with pytest.raises(DataError, match=rf"{other.name}: {words}.*: give a COCO panoptic file"):
                evaluate_files(*pair)


def test_pngs_may_lie_beside_the_json(files):
    """Where `PanopticResult.save` puts the one of a photo."""
    prediction, truth = files
    for png in prediction.with_suffix("").iterdir():
        png.rename(prediction.parent / png.name)
    prediction.with_suffix("").rmdir()
    assert evaluate_files(prediction, truth)["panoptic"]["all"]["pq"] == 100.0
    (prediction.parent / png.name).unlink()
    with pytest.raises(UserError, match=r"No such file|there is no such folder"):
        evaluate_files(prediction, truth)


def test_image_without_prediction(files):
    drop_image(files[0])
    with pytest.raises(DataError, match=rf"image {FIRST} of panoptic_train.json has no annotation"):
        evaluate_files(*files)
