"""Runs that are stopped, killed or hurt, by the real command: they end in good order and go on bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import pytest
import torch

from tests.processes import ROOT, clean_environment
from tests.tiny import write_tiny
from upsnet.engine.snapshots import check_whole

pytestmark = pytest.mark.slow

SECONDS = 240
PROGRAM = ROOT / "upsnet" / "upsnet_end2end_train.py"
STEPS = ("train.max_iteration=20", "train.snapshot_step=5", "train.batch_size=1", "train.total_batch=2")


@pytest.fixture
def recipe(tmp_path):
    return write_tiny(tmp_path)


@contextmanager
def started(recipe, out, *changes, workers=1, torchrun=()):
    """A training with its output in a folder of its own, a session of its own, and nothing of it left at the end."""
    program = [str(PROGRAM), "--cfg", str(recipe), f"output_path={out}", *STEPS, *changes]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}", *torchrun]
    command = [sys.executable, *(launcher if workers > 1 else ()), *program]
    with open(out.with_suffix(".err"), "w+") as err:
        process = subprocess.Popen(command, env=clean_environment(), stderr=err, text=True, start_new_session=True)
        try:
            yield process
        finally:
            kill_all(process)


def finished(recipe, out, *changes, **launch):
    """Exit code and what was said."""
    with started(recipe, out, *changes, **launch) as process:
        process.wait(SECONDS)
    return process.returncode, out.with_suffix(".err").read_text()


def wait_for(process, path):
    end = time.monotonic() + SECONDS
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, f"{path} does not come"
        time.sleep(0.05)


def snapshot(out, step):
    return out / "tiny" / "train" / f"tiny_{step}.pth"


def losses(out):
    lines = (out / "tiny" / "train" / "metrics.jsonl").read_text().splitlines()
    return [(line["iteration"], line["total"]) for line in map(json.loads, lines)]


def kill_all(process):
    """Power is gone: the launcher and its workers, which have sessions of their own."""
    pids = [*children(process.pid), process.pid] if process.poll() is None else []
    for pid in pids:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    process.wait(SECONDS)


def children(pid):
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return sorted(map(int, listed.split()))


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_gone_on_with(recipe, tmp_path, workers):
    """Mid-epoch: an epoch has six steps."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, said = finished(recipe, whole, workers=workers)
    assert code == 0, said
    with started(recipe, broken, workers=workers) as process:
        wait_for(process, snapshot(broken, 10).with_suffix(".state.pth"))
        kill_all(process)
    code, said = finished(recipe, broken, "train.resume=auto", workers=workers)
    assert code == 0 and "resuming after step 1" in said, said
    weights = [torch.load(snapshot(out, 20), weights_only=True)["weights"] for out in (whole, broken)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    states = [torch.load(snapshot(out, 20).with_suffix(".state.pth"), weights_only=True) for out in (whole, broken)]
    kept = [state["optimizer"]["state"] for state in states]
    for number, values in kept[0].items():
        assert all(torch.equal(tensor, kept[1][number][name]) for name, tensor in values.items())
    assert losses(whole) == losses(broken)
    code, said = finished(recipe, broken, "train.resume=auto")
    assert code == 0 and "finished already" in said


def test_a_lost_worker_is_replaced_by_torchrun(recipe, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert finished(recipe, whole, workers=2)[0] == 0
    earlier = snapshot(broken, 19)  # of a run that this one replaces
    earlier.parent.mkdir(parents=True)
    for end in (".pth", ".state.pth"):
        earlier.with_suffix(end).write_bytes(snapshot(whole, 20).with_suffix(end).read_bytes())
    with started(recipe, broken, workers=2, torchrun=("--max-restarts=1",)) as process:
        wait_for(process, snapshot(broken, 5).with_suffix(".state.pth"))
        os.kill(children(process.pid)[-1], signal.SIGKILL)
        assert process.wait(SECONDS) == 0
    assert "resuming after step" in broken.with_suffix(".err").read_text()
    assert losses(whole) == losses(broken)


@pytest.mark.parametrize("workers, number", [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_stops_after_the_step_with_a_snapshot(recipe, tmp_path, workers, number):
    out = tmp_path / "out"
    # Loader processes, too, get the signal, as a cluster or a terminal sends it.
    changes = ("dataset.num_workers=1", "train.max_iteration=2000", "train.lr=0.0005")
    with started(recipe, out, *changes, workers=workers) as process:
        wait_for(process, snapshot(out, 5).with_suffix(".state.pth"))
        began = time.monotonic()
        os.killpg(process.pid, number)
        code = process.wait(SECONDS)
    said = out.with_suffix(".err").read_text()
    assert code == 75 if workers == 1 else code != 0, said
    assert said.count("goes on there") == 1 and "train.resume=auto" in said and time.monotonic() - began < 30
    if workers == 1:
        assert "Traceback" not in said
    step = max(int(path.name.split("_")[1].split(".")[0]) for path in snapshot(out, 5).parent.glob("*.state.pth"))
    assert f"stopped by a signal after step {step};" in said


def test_a_bad_image_ends_all_workers_in_one_sentence(recipe, tmp_path):
    photo = tmp_path / "data/images/train/000000000003.jpg"
    photo.write_bytes(photo.read_bytes()[:700])
    code, said = finished(recipe, tmp_path / "out", workers=2)
    assert code != 0 and said.count("is cut off") == 1, said
    code, said = finished(recipe, tmp_path / "skips", "train.bad_images=skip", workers=2)
    assert code == 0 and said.count("skipped, another image takes its place") == 1, said
    assert "1 bad images were skipped, " in said


IN_SMALL_TMPFS = 'mount -t tmpfs -o size=150m none "$0" && "$@"; code=$?; cp -r "$0/." "$0.after"; exit $code'
"""In a namespace of its own, in which anybody may mount: one snapshot of 90 MB has room, two have not."""


@pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0
    if shutil.which("unshare")
    else True,
    reason="this system gives nobody a namespace to mount in",
)
def test_a_full_disk_ends_in_one_sentence_and_leaves_the_last_snapshot_whole(recipe, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    program = [sys.executable, str(PROGRAM), "--cfg", str(recipe), f"output_path={out}", *STEPS]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", IN_SMALL_TMPFS, str(out), *program],
        env=clean_environment(), capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("No space left on device") == 1, done.stderr
    assert "Traceback" not in done.stderr and "tiny_10" in done.stderr
    left = snapshot(tmp_path / "out.after", 5)
    assert check_whole(left)["iteration"] == 5
    assert {path.name for path in left.parent.glob("*.pth")} == {left.name, "tiny_5.state.pth"}
    assert not list(left.parent.glob(".*.tmp"))
