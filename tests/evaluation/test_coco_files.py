import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.miniature import edited, image_id_of, write_miniature
from upsnet.evaluation.coco_files import evaluate_files
from upsnet.structures.errors import DataError, UserError

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


def test_truth_as_prediction(files, tmp_path):
    prediction, truth = files
    summary = evaluate_files(prediction, truth, tmp_path / "out" / "summary.json")
    for group in ("all", "things", "stuff"):
        assert summary["panoptic"][group]["pq"] == 100.0
    assert sum(row["tp"] for row in summary["panoptic"]["per_class"]) == 20
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary


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
    (double_image, f"image {FIRST} has two annotations"),
    (no_annotations, "has no"),
    (lambda path: path.write_text("[]"), "is a list, not an object"),
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


def test_image_without_prediction(files):
    drop_image(files[0])
    with pytest.raises(DataError, match=rf"image {FIRST} of panoptic_train.json has no annotation"):
        evaluate_files(*files)
