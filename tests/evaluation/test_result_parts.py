import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from tests.miniature import write_miniature
from tests.reference.panoptic_files import as_prediction, read_categories, read_truths, with_instances
from upsnet.evaluation.cityscapes import CityscapesAP
from upsnet.evaluation.detection_files import detection_file
from upsnet.evaluation.instance_ap import InstanceAP
from upsnet.evaluation.panoptic_quality import PanopticQuality
from upsnet.evaluation.result_files import PngNames, ResultWriter, parts_folder
from upsnet.evaluation.result_parts import PartWriter, check_parts, read_parts
from upsnet.evaluation.semantic_iou import SemanticIoU
from upsnet.structures.class_tables import class_table
from upsnet.structures.errors import DataError, PlaceError
from upsnet.structures.results import Detections, Truth


@pytest.fixture(scope="module", params=[False, True])
def miniature(request, tmp_path_factory):
    """Class table and truths; instances made from the PNGs, or polygons and RLEs of a json."""
    folder = write_miniature(tmp_path_factory.mktemp("data"), instances=request.param)
    path = folder / "annotations" / "panoptic_train.json"
    return read_categories(path), read_truths(path)


def as_json(value):
    return json.loads(json.dumps(value))


def predictions_of(categories, truths):
    moved = [as_prediction(truth, np.roll(truth.segment_map, 3, axis=1)) for truth in truths]
    predictions = [with_instances(each, categories, np.linspace(0.91, 0.13, 9)) for each in moved]
    for prediction, truth in zip(predictions, truths, strict=True):
        prediction.semantic_map = np.roll(truth.semantic_map, 2, axis=0)
    return predictions


def test_what_evaluators_measure_can_travel_as_json(miniature, tmp_path):
    categories, truths = miniature
    predictions = predictions_of(categories, truths)
    with ResultWriter(tmp_path, categories) as writer:
        for prediction in predictions:
            writer.add(prediction)
    makers = [lambda: PanopticQuality(categories), lambda: SemanticIoU(categories)]
    makers += [
        lambda kind=kind: InstanceAP(categories, detection_file(tmp_path, kind), kind) for kind in ("bbox", "segm")
    ]
    for make in makers:
        direct, travelled = make(), make()
        for prediction, truth in zip(predictions, truths, strict=True):
            direct.add(prediction, truth)
            travelled.count(as_json(travelled.measure(prediction, truth)))
        assert travelled.summary() == direct.summary()


def test_what_cityscapes_rule_measures_can_travel_as_json():
    categories = class_table("Cityscapes")
    assert categories is not None
    car = next(category for category in categories if category.name == "car")
    ids = np.full((40, 60), 7, np.uint16)
    ids[:20, :20], ids[20:, 40:] = 26000, 26001
    masks = [coco_mask.encode(np.asfortranarray(ids == 26000 + i, dtype=np.uint8)) for i in range(2)]
    classes = np.array([categories.thing_class(car.id)] * 2)
    truth = Truth(1, "a.png", np.zeros((40, 60), np.int32), [], np.zeros((40, 60), np.int16))
    prediction = as_prediction(truth)
    prediction.instances = Detections(np.zeros((2, 4), np.float32), classes, np.float32([0.7, 0.1]), masks)
    direct, travelled = (CityscapesAP(categories, lambda name: ids) for _ in range(2))
    direct.add(prediction, truth)
    travelled.count(as_json(direct.measure(prediction, truth)))
    assert travelled.summary() == direct.summary() and direct.summary()["ap"] == 100.0


def write_parts(folder, predictions, categories, shares):
    names = {prediction.image_id: f"{prediction.image_id}.png" for prediction in predictions}
    for worker, share in enumerate(shares):
        with PartWriter(folder, worker, names, categories) as part:
            for i in share:
                part.add(predictions[i], {"number": i})
    return [prediction.image_id for prediction in predictions]


def test_parts_come_together_in_the_order_asked_for(miniature, tmp_path):
    predictions = predictions_of(*miniature)
    image_ids = write_parts(tmp_path, predictions, miniature[0], [[0, 3], [1, 4], [2, 5], []])
    read = list(read_parts(tmp_path, 4, image_ids))
    assert [measured for _, measured in read] == [{"number": i} for i in range(6)]
    assert [stored["image"]["id"] for stored, _ in read] == image_ids


@pytest.mark.parametrize(
    "shares, message",
    [
        ([[0, 1], [2, 4, 5]], "0 workers have stored image 24"),
        ([[0, 1, 3], [2, 3, 4, 5]], "2 workers have stored image 24"),
        ([[0, 1, 1], [2, 3, 4, 5]], "2 workers have stored image 10"),
        ([[0, 2, 1], [3, 4, 5]], "0 workers have stored image 10"),
    ],
)
def test_every_image_counts_once(miniature, tmp_path, shares, message):
    predictions = predictions_of(*miniature)
    image_ids = write_parts(tmp_path, predictions, miniature[0], shares)
    with pytest.raises(DataError, match=message):
        list(read_parts(tmp_path, 2, image_ids))


def test_an_image_that_was_not_asked_for_is_refused(miniature, tmp_path):
    predictions = predictions_of(*miniature)
    image_ids = write_parts(tmp_path, predictions, miniature[0], [[0, 1, 2, 3, 4, 5]])
    with pytest.raises(DataError, match=f"the records of image {image_ids[-1]} do not follow"):
        list(read_parts(tmp_path, 1, image_ids[:-1]))


def test_a_part_is_seen_from_the_beginning_and_gone_after_an_error(miniature, tmp_path):
    with pytest.raises(ZeroDivisionError), PartWriter(tmp_path, 0, {}, miniature[0]):
        check_parts(tmp_path, 1)
        with pytest.raises(PlaceError, match="the results of worker 1 do not arrive"):
            check_parts(tmp_path, 2)
        raise ZeroDivisionError
    assert list(parts_folder(tmp_path).iterdir()) == []


def test_a_full_disk(miniature, tmp_path):
    path = parts_folder(tmp_path) / "0.json.part"
    path.parent.mkdir()
    path.symlink_to("/dev/full")
    predictions = predictions_of(*miniature)
    with pytest.raises(PlaceError, match=r"0\.json: No space left on device: make room"):
        write_parts(tmp_path, predictions, miniature[0], [[0, 1]])


def test_names_of_pngs_depend_on_the_photos_before():
    names = PngNames()
    given = [names.of(i, name) for i, name in enumerate(["x/a.jpg", "y/a.jpg", "b.png", "A.jpg"])]
    assert given == ["a.png", "a_1.png", "b.png", "A_3.png"]
