"""Archives for COCO's servers: names and content; scored as a server would score them."""

import json
import shutil
import zipfile

import numpy as np
import pytest

from tests.miniature import edited, write_miniature
from tests.reference.panoptic_files import (
    as_prediction,
    read_categories,
    read_truths,
    store_results,
    with_instances,
)
from upsnet.evaluation.coco_submission import write_coco_submission
from upsnet.evaluation.detection_files import DETECTION_KINDS, detection_file
from upsnet.evaluation.instance_ap import InstanceAP
from upsnet.evaluation.panoptic_files import evaluate_files
from upsnet.evaluation.result_files import read_results
from upsnet.structures.errors import PlaceError, UserError

PANOPTIC = "panoptic_test-dev2017_my-net-2_results"
DETECTIONS = "detections_test-dev2017_my-net-2_results"


@pytest.fixture
def stored(tmp_path):
    """The truth of a miniature, its class table and a result folder with slightly wrong predictions."""
    path = write_miniature(tmp_path / "data") / "annotations" / "panoptic_train.json"
    categories, truths = read_categories(path), read_truths(path)
    predictions = []
    for truth in truths:
        moved = np.roll(as_prediction(truth).segment_map, 3, axis=1)
        predictions.append(with_instances(as_prediction(truth, moved), categories, np.linspace(0.91, 0.13, 9)))
    store_results(tmp_path / "results", predictions, categories)
    return path, categories, tmp_path / "results"


def submit(stored, out):
    _, categories, results = stored
    predictions = read_results(results, categories)
    return write_coco_submission(results, predictions, "test-dev2017", "my_net 2", out)


def test_names_and_content(stored, tmp_path):
    _, _, results = stored
    stale = results / "panoptic" / "stale.png"
    stale.write_bytes(b"of an earlier test")
    out = tmp_path / "submission"
    files = submit(stored, out)
    expected = [f"{PANOPTIC}.zip", f"bbox/{DETECTIONS}.zip", f"segm/{DETECTIONS}.zip"]
    assert [file.relative_to(out).as_posix() for file in files] == expected
    assert sorted(path for path in out.rglob("*") if path.is_file()) == sorted(files)

    with zipfile.ZipFile(files[0]) as archive:
        record = json.loads(archive.read(f"{PANOPTIC}.json"))["annotations"]
        pngs = [f"{PANOPTIC}/{r['file_name']}" for r in record]
        assert sorted(archive.namelist()) == sorted([f"{PANOPTIC}.json", *pngs]) and archive.testzip() is None
        assert all({"id", "category_id"} <= s.keys() for r in record for s in r["segments_info"])
        assert archive.read(pngs[0]) == (results / "panoptic" / record[0]["file_name"]).read_bytes()
    for kind, file in zip(DETECTION_KINDS, files[1:], strict=True):
        with zipfile.ZipFile(file) as archive:
            assert archive.namelist() == [f"{DETECTIONS}.json"]
            assert archive.read(f"{DETECTIONS}.json") == detection_file(results, kind).read_bytes()


def test_a_server_gives_our_scores(stored, tmp_path):
    truth, categories, results = stored
    panoptic, *detections = submit(stored, tmp_path / "submission")
    with zipfile.ZipFile(panoptic) as archive:
        archive.extractall(tmp_path / "server")
    ours = evaluate_files(results / "panoptic.json", truth)
    assert evaluate_files(tmp_path / "server" / f"{PANOPTIC}.json", truth) == ours
    assert 0 < ours["panoptic"]["all"]["pq"] < 100
    for kind, file in zip(DETECTION_KINDS, detections, strict=True):
        with zipfile.ZipFile(file) as archive:
            archive.extractall(tmp_path / kind)
        scores = []
        for path in (tmp_path / kind / f"{DETECTIONS}.json", detection_file(results, kind)):
            ap = InstanceAP(categories, path, kind)
            for prediction, of_photo in zip(read_results(results, categories), read_truths(truth), strict=True):
                ap.add(prediction, of_photo)
            scores.append(ap.summary())
        assert scores[0] == scores[1] and 0 < scores[0]["ap"] < 100


def unlink(name):
    return lambda results: next(results.glob(name)).unlink()


def other_ids(results):
    with edited(results / "panoptic.json") as content:
        content["annotations"][0]["segments_info"].pop()


def without_detections(results):
    with edited(results / "index.json") as content:
        content["parts"].remove("instances")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (unlink("index.json"), "holds no complete results"),
        (unlink("panoptic/*10.png"), r"image 10: .*000000000010\.png: cannot be read"),
        (unlink("segm_results.json"), r"cannot read .*segm_results\.json"),
        (other_ids, "image 3: PNG and panoptic.json hold other segment ids: run the test again"),
        (without_detections, "image 3: panoptic map or instances are missing"),
        (shutil.rmtree, "holds no complete results"),
    ],
)
def test_incomplete_results_are_refused(stored, tmp_path, damage, words):
    damage(stored[2])
    with pytest.raises(UserError, match=words):
        submit(stored, tmp_path / "submission")
    assert not (tmp_path / "submission").exists()


@pytest.mark.parametrize("name", [PANOPTIC, f"segm/{DETECTIONS}"])
def test_full_disk(stored, tmp_path, name):
    out = tmp_path / "submission"
    part = out / f"{name}.zip.part"
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    with pytest.raises(PlaceError, match=f"cannot write .*{name}.zip: No space left on device"):
        submit(stored, out)
    assert not [path for path in out.rglob("*") if path.is_file()]
