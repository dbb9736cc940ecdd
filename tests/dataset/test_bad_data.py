"""What contradicts itself is refused in one sentence that names the file, the image and the segment."""

import json

import cv2
import numpy as np
import pytest

from tests.miniature import edited, write_miniature
from upsnet.dataset.coco_panoptic import CocoPanoptic
from upsnet.dataset.image_sets import coco_image_sets
from upsnet.dataset.transforms import Transform
from upsnet.structures.errors import DataError

PANOPTIC, INSTANCES = "annotations/panoptic_train.json", "annotations/instances_train.json"
PHOTO, LABEL = "images/train/000000000017.jpg", "annotations/panoptic_train/000000000017.png"


def read_everything(folder):
    data_set = CocoPanoptic(coco_image_sets(folder, "train"), Transform((48,), 100), flip_copies=True)
    for i in range(data_set.num_photos):
        data_set.truth(i)
    return list(data_set)


def of_image(content, image_id=17, key="annotations"):
    return next(a for a in content[key] if a.get("image_id", a.get("id")) == image_id)


def cut_file(name, keep):
    def damage(folder):
        path = folder / name
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep)])

    return damage


def resize(name, height, width):
    def damage(folder):
        picture = cv2.imread(str(folder / name))
        cv2.imwrite(str(folder / name), cv2.resize(picture, (width, height), interpolation=cv2.INTER_NEAREST))

    return damage


def remove(name):
    return lambda folder: (folder / name).unlink()


def change(name, edit):
    def damage(folder):
        with edited(folder / name) as content:
            edit(content)

    return damage


def segment(content, position=0):
    return of_image(content)["segments_info"][position]


def paint_void(folder):
    picture = cv2.imread(str(folder / LABEL))
    picture[(picture == picture[0, 0]).all(axis=2)] = 0
    cv2.imwrite(str(folder / LABEL), picture)


def remove_images_folder(folder):
    (folder / "images").rename(folder / "pictures")


def grey_label(folder):
    cv2.imwrite(str(folder / LABEL), np.zeros((64, 48), np.uint8))


P = "panoptic_train.json"
CASES = {
    "truncated JPEG": (cut_file(PHOTO, 0.5), ["image 17", "000000000017.jpg", "cut off"]),
    "JPEG without its last bytes": (cut_file(PHOTO, 0.999), ["image 17", "000000000017.jpg", "cut off"]),
    "truncated PNG": (cut_file(LABEL, 0.5), ["image 17", "000000000017.png", "cut off"]),
    "photo of another size": (resize(PHOTO, 60, 48), ["image 17", "000000000017.jpg", "60×48", "64×48"]),
    "label of another size": (resize(LABEL, 64, 47), ["image 17", "000000000017.png", "64×47", "64×48"]),
    "grey label": (grey_label, ["image 17", "000000000017.png", "RGB"]),
    "PNG id without record": (
        change(PANOPTIC, lambda c: of_image(c)["segments_info"].pop(2)),
        ["image 17", "000000000017.png", "segment 999", P],
    ),
    "record without pixels": (paint_void, ["image 17", "000000000017.png", "segment 70000", P]),
    "unknown category": (
        change(PANOPTIC, lambda c: segment(c).update(category_id=77)),
        [P, "image 17", "segment 41", "category 77"],
    ),
    "duplicate segment id": (change(PANOPTIC, lambda c: segment(c).update(id=999)), [P, "image 17", "segment id 999"]),
    "segment id 0": (change(PANOPTIC, lambda c: segment(c).update(id=0)), [P, "image 17", "segment id 0"]),
    "segment id too large": (change(PANOPTIC, lambda c: segment(c).update(id=1 << 24)), [P, "image 17", "16777216"]),
    "segment id that is text": (change(PANOPTIC, lambda c: segment(c).update(id="a")), [P, "image 17"]),
    "missing isthing": (change(PANOPTIC, lambda c: c["categories"][2].pop("isthing")), [P, "'box'", "'isthing'"]),
    "doubled category": (change(PANOPTIC, lambda c: c["categories"][2].update(id=7)), [P, "category id 7"]),
    "no categories": (change(PANOPTIC, lambda c: c.pop("categories")), [P, "categories"]),
    "no images": (change(PANOPTIC, lambda c: c.update(images=[], annotations=[])), [P, "no images"]),
    "missing PNG": (remove(LABEL), ["image 17", "000000000017.png", "No such file"]),
    "missing photo": (remove(PHOTO), ["image 17", "000000000017.jpg", "No such file"]),
    "missing json": (remove(PANOPTIC), [P, "No such file"]),
    "missing folder": (remove_images_folder, ["images/train", "no such folder"]),
    "broken json": (cut_file(PANOPTIC, 0.7), [P, "not a valid json file"]),
    "annotation without image": (
        change(PANOPTIC, lambda c: c["images"].remove(of_image(c, key="images"))),
        [P, "image 17", "no such image"],
    ),
    "image without annotation": (
        change(PANOPTIC, lambda c: c["annotations"].remove(of_image(c))),
        [P, "image 17", "no annotation"],
    ),
    "image twice": (change(PANOPTIC, lambda c: c["images"].append(c["images"][0])), [P, "image id 38", "twice"]),
    "annotation twice": (change(PANOPTIC, lambda c: c["annotations"].append(of_image(c))), [P, "image id 17", "twice"]),
    "image without height": (
        change(PANOPTIC, lambda c: of_image(c, 17, "images").pop("height")),
        [P, "17", "'height'"],
    ),
    "image without pixels": (change(PANOPTIC, lambda c: of_image(c, 17, "images").update(width=0)), [P, "'id': 17"]),
    "segment without category": (
        change(PANOPTIC, lambda c: segment(c).pop("category_id")),
        [P, "image 17", "segment 41", "'category_id'"],
    ),
    "annotation without segments": (
        change(PANOPTIC, lambda c: of_image(c).pop("segments_info")),
        [P, "image 17", "'segments_info'"],
    ),
    "instance of unknown class": (
        change(INSTANCES, lambda c: of_image(c).update(category_id=7)),
        ["instances_train.json", "image 17", "annotation 4", "category 7"],
    ),
    "instance of unknown image": (
        change(INSTANCES, lambda c: of_image(c).update(image_id=18)),
        ["instances_train.json", "annotation 4", "image 18"],
    ),
    "instance without box": (
        change(INSTANCES, lambda c: of_image(c).pop("bbox")),
        ["instances_train.json", "annotation 4", "image 17", "'bbox'"],
    ),
    "instance with half a box": (
        change(INSTANCES, lambda c: of_image(c).update(bbox=[1, 2])),
        ["instances_train.json", "annotation 4", "image 17"],
    ),
    "RLE of another size": (
        change(INSTANCES, lambda c: of_image(c)["segmentation"].update(size=[48, 64])),
        ["instances_train.json", "image 17", "annotation 4", "[48, 64]"],
    ),
    "no instances at all": (
        change(INSTANCES, lambda c: c.update(annotations=[])),
        ["instances_train.json", "has no annotations, but", P],
    ),
    "instance id too large": (
        change(INSTANCES, lambda c: of_image(c).update(image_id=1 << 70)),
        ["instances_train.json", "annotation 4", "malformed"],
    ),
    "image id too large": (
        change(PANOPTIC, lambda c: of_image(c, 17, "images").update(id=1 << 70)),
        [P, "image record"],
    ),
    "photo too high": (change(PANOPTIC, lambda c: of_image(c, 17, "images").update(height=1 << 40)), [P, "'id': 17"]),
    "annotation id too large": (
        change(PANOPTIC, lambda c: of_image(c).update(image_id=1 << 70)),
        [P, f"image {1 << 70}", "malformed"],
    ),
    "broken instances json": (cut_file(INSTANCES, 0.7), ["instances_train.json", "not a valid json file"]),
}


def test_the_undamaged_set_is_fine(tmp_path):
    assert len(read_everything(write_miniature(tmp_path, instances=True))) == 12


@pytest.mark.parametrize("case", CASES)
def test_bad_data_is_refused_in_one_sentence(tmp_path, case):
    damage, parts = CASES[case]
    folder = write_miniature(tmp_path, instances=True)
    damage(folder)
    with pytest.raises(DataError) as caught:
        read_everything(folder)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for part in parts:
        assert part in sentence, sentence


def test_sets_that_do_not_go_together(tmp_path):
    write_miniature(tmp_path, "train")
    write_miniature(tmp_path, "val")
    with pytest.raises(DataError, match=r"panoptic_val\.json: image id 3 .*panoptic_train\.json"):
        CocoPanoptic(coco_image_sets(tmp_path, "train+val"))
    path = tmp_path / "annotations/panoptic_val.json"
    path.write_text(json.dumps(json.loads(path.read_text().replace("kite", "dragon"))))
    with pytest.raises(DataError, match=r"panoptic_val\.json: its categories differ"):
        CocoPanoptic(coco_image_sets(tmp_path, "train+val"))
