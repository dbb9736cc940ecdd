"""`upsnet evaluate` as a user types it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.miniature import edited, write_miniature
from tests.tiny import upsnet
from upsnet.evaluation.panoptic_files import evaluate_files

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def files(tmp_path):
    """Truth and the same as prediction, without the image that has a crowd."""
    truth = write_miniature(tmp_path) / "annotations" / "panoptic_train.json"
    with edited(truth) as content:
        del content["annotations"][2]
    prediction = tmp_path / "prediction" / "panoptic.json"
    shutil.copytree(truth.with_suffix(""), prediction.with_suffix(""))
    shutil.copy(truth, prediction)
    return "--pred", prediction, "--gt", truth


def test_tables(files, tmp_path):
    ran = upsnet("evaluate", *files, "--out", tmp_path / "out" / "summary.json")
    assert ran.code == 0 and "All     100.0  100.0  100.0  5" in ran.out and "Boundary" not in ran.out
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == evaluate_files(files[1], files[3])


def test_a_summary_that_cannot_be_written_does_not_cost_the_score(files, tmp_path):
    ran = upsnet("evaluate", *files, "--out", tmp_path)
    assert ran.code == 2 and len(ran.errors) == 1 and "cannot write" in ran.errors[0]
    assert "All     100.0  100.0  100.0  5" in ran.out


def test_boundary(files, tmp_path):
    ran = upsnet("evaluate", *files, "--boundary", "--out", tmp_path / "summary.json")
    assert ran.code == 0 and re.search(r"Boundary +PQ +SQ +RQ +n\n", ran.out)
    assert json.loads((tmp_path / "summary.json").read_text()).keys() == {"panoptic", "boundary"}


def test_official(files):
    with edited(files[3]) as content:
        content["annotations"][0]["segments_info"][0]["area"] += 1
    refused, believed = upsnet("evaluate", *files), upsnet("evaluate", *files, "--official")
    assert refused.code == 2 and len(refused.errors) == 1 and "'area' says" in refused.errors[0]
    assert "--official" in refused.errors[0] and believed.code == 0 and " 100.0 " in believed.out


def test_workers(files):
    several, alone = (upsnet("evaluate", *files, "--workers", count) for count in (3, 1))
    assert several.code == 0 and several.out == alone.out
    for count in ("0", "-2"):
        ran = upsnet("evaluate", *files, "--workers", count)
        assert ran.code == 2 and len(ran.errors) == 1 and "at least 1" in ran.errors[0]
    assert "--workers" in upsnet("evaluate", *files, "--workers", "many").errors[0]


def test_an_error_in_a_worker_is_one_sentence(files):
    shutil.rmtree(files[1].with_suffix(""))
    files[1].with_suffix("").mkdir()
    ran = upsnet("evaluate", *files, "--workers", 2)
    assert ran.code == 2 and len(ran.errors) == 1 and "Traceback" not in ran.err


def test_ctrl_c_is_clean(files, tmp_path):
    """The terminal sends the signal to all processes of the group: none of them complains, none stays."""
    for path in (files[1], files[3]):
        with edited(path) as content:
            first = content["annotations"][0]
            content["annotations"] = [{**first, "image_id": i} for i in range(20000)]
    out = tmp_path / "summary.json"
    ran = subprocess.Popen(
        [sys.executable, "-m", "upsnet", "evaluate", *map(str, files), "--workers", "2", "--out", str(out)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert ran.stderr is not None
    said = b""
    while not re.search(rb" [1-9]\d*/20000", said):  # the bar moves: workers are at work
        said += os.read(ran.stderr.fileno(), 4096)
    os.killpg(ran.pid, signal.SIGINT)
    printed, rest = ran.communicate(timeout=60)
    assert ran.returncode == 130 and not printed and not out.exists()
    assert re.split(rb"[\r\n]+", rest.strip())[-1] == b"upsnet: interrupted" and b"Traceback" not in said + rest
    for _ in range(100):
        try:
            os.killpg(ran.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("a worker is still there")
