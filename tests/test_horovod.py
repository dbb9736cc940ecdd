"""The real commands on two workers of Horovod, as horovodrun starts them."""

import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch

from tests.processes import ROOT, clean_environment
from tests.same_training import STEPS, TRAIN, assert_same_training
from tests.tiny import write_tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("horovod") is None, reason="Horovod is not installed: ./init.sh horovod"),
]

HOROVODRUN = [sys.executable, "-m", "horovod.runner.launch"]
SECONDS = 240


@contextmanager
def started(*command, log):
    """A process whose workers, which horovodrun puts into groups of their own, do not outlive the test either."""
    import psutil

    with log.open("w") as output:
        process = psutil.Popen(
            [str(word) for word in command], cwd=ROOT, env=clean_environment(), stdout=output, stderr=subprocess.STDOUT
        )
        try:
            yield process
        finally:
            for left in [*process.children(recursive=True), process] if process.is_running() else []:
                left.kill()


def run(*command, log):
    with started(*command, log=log) as process:
        return process.wait(SECONDS)


def wait_until(holds, process, log):
    end = time.monotonic() + SECONDS
    while not holds():
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.05)


def test_horovodrun_on_two_workers_trains_like_one_with_twice_the_accumulation(tmp_path):
    recipe, log = write_tiny(tmp_path), tmp_path / "log"
    assert run(sys.executable, TRAIN, "--cfg", recipe, *STEPS, f"output_path={tmp_path}/one", log=log) == 0
    two = [sys.executable, TRAIN, "--cfg", recipe, *STEPS, "train.use_horovod=true", f"output_path={tmp_path}/two"]
    assert run(*HOROVODRUN, "-np", 2, *two, log=log) == 0, log.read_text()
    assert "2 workers × 2 images × 1 micro-batches" in log.read_text()
    assert_same_training(tmp_path / "one", tmp_path / "two", 20)
    # The optimiser's state does not show who trained: a plain launch goes on from it.
    one, two = (
        torch.load(tmp_path / name / "tiny/train/tiny_20.state.pth", weights_only=True) for name in ("one", "two")
    )
    assert one["optimizer_class"] == two["optimizer_class"]
    assert one["optimizer"]["param_groups"] == two["optimizer"]["param_groups"]
    for own, other in zip(one["optimizer"]["state"].values(), two["optimizer"]["state"].values(), strict=True):
        assert torch.equal(own["momentum_buffer"], other["momentum_buffer"])


def test_compressed_gradients_are_rounded(tmp_path):
    recipe, log = write_tiny(tmp_path), tmp_path / "log"
    weights = []
    for kind in ("none", "fp16"):
        options = ["train.use_horovod=true", f"train.horovod_compression={kind}", f"output_path={tmp_path}/{kind}"]
        assert run(*HOROVODRUN, "-np", 2, sys.executable, TRAIN, "--cfg", recipe, *options, log=log) == 0
        stored = torch.load(tmp_path / kind / "tiny/train/tiny_2.pth", weights_only=True)["weights"]
        weights.append(torch.cat([t.flatten() for name, t in stored.items() if name.endswith("weight")]))
    assert not torch.equal(*weights)
    torch.testing.assert_close(*weights, rtol=0, atol=1e-3)


def test_horovodrun_of_a_recipe_without_horovod_says_what_to_add(tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, TRAIN, "--cfg", write_tiny(tmp_path)]
    assert run(*HOROVODRUN, "-np", 2, *command, log=log) != 0
    assert "add train.use_horovod=true to the command" in log.read_text()
    assert not (tmp_path / "out").exists()


def test_elastic_workers_come_and_go_and_train_what_one_would(tmp_path):
    """2 → 1 (killed) → 2 workers: no step is lost or done twice."""
    recipe, log = write_tiny(tmp_path), tmp_path / "log"
    steps = ["train.max_iteration=60", "train.snapshot_step=60", *STEPS[2:]]
    assert run(sys.executable, TRAIN, "--cfg", recipe, *steps, f"output_path={tmp_path}/one", log=log) == 0

    # Horovod gives up a whole machine when one of its workers dies, so this one stands for three.
    hosts, discovery = tmp_path / "hosts", tmp_path / "discover"
    hosts.write_text("localhost:1\n127.0.0.1:1\n")
    discovery.write_text(f"#!/bin/sh\ncat {hosts}\n")
    discovery.chmod(0o755)
    elastic = ["-np", 2, "--min-np", 1, "--network-interfaces", "lo", "--host-discovery-script", discovery]
    training = [TRAIN, "--cfg", recipe, *steps, "train.use_horovod=true", f"output_path={tmp_path}/two"]
    metrics = tmp_path / "two/tiny/train/metrics.jsonl"

    def steps_done():
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    with started(*HOROVODRUN, *elastic, sys.executable, *training, log=log) as process:
        wait_until(lambda: steps_done() >= 5, process, log)
        worker_on(process, "127.0.0.1").send_signal(signal.SIGKILL)
        wait_until(lambda: "1 worker × 2 images × 2 micro-batches" in log.read_text(), process, log)
        seen = steps_done()
        wait_until(lambda: steps_done() >= seen + 3, process, log)
        hosts.write_text("localhost:1\n127.0.1:1\n")
        assert process.wait(SECONDS) == 0, log.read_text()
    assert log.read_text().count("2 workers × 2 images × 1 micro-batches") == 2
    assert_same_training(tmp_path / "one", tmp_path / "two", 60)


def worker_on(process, host):
    found = [
        child
        for child in process.children(recursive=True)
        if TRAIN in child.cmdline()[:2] and child.environ().get("HOROVOD_HOSTNAME") == host
    ]
    assert len(found) == 1
    return found[0]
