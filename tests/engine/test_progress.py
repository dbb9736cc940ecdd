"""What the log says of waiting for images and of memory."""

import threading
import time
from dataclasses import replace

import pytest
import torch

from tests.engine.thread_workers import together
from tests.engine.toy import OPTIONS, Recorder, Toy, batches
from upsnet.engine.log import peak_memory
from upsnet.engine.optimizer import build_optimizer
from upsnet.engine.progress import Progress, StepValues
from upsnet.engine.train import train


def told(waits, caplog):
    """Progress after steps of 2 images and a second each, of which `waits` are seconds of waiting; lines of 2 steps."""
    log = Recorder()
    options = replace(OPTIONS, display_iter=2, max_iteration=len(waits))
    progress = Progress(log, options, torch.device("cpu"))
    for step, waited in enumerate(waits, start=1):
        progress.step(step, 0.1, StepValues({"a": 1.0}, {}, 2, waited, memory=2048.0), 1.0)
    return log.lines, progress.text(), [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


def test_waiting_by_image_and_as_a_share(caplog):
    lines, text, _ = told([0.5, 0.1, 0.0, 0.02], caplog)
    assert [line["data_seconds"] for line in lines] == pytest.approx([0.15, 0.005])
    assert [line["data_seconds"] * line["images_per_second"] for line in lines] == pytest.approx([0.3, 0.01])
    assert "img/s=2.00 data=1% mem=2.0G" in text and lines[0]["memory"] == 2048.0


@pytest.mark.parametrize(
    "waits, warns",
    [
        ([0.9, 0.9], False),  # loader processes have just started
        ([0.9, 0.9, 0.1, 0.25], False),
        ([0.0, 0.0, 0.1, 0.35, 0.9, 0.9], True),  # once
    ],
)
def test_a_device_that_waits_is_worth_a_warning(caplog, waits, warns):
    _, _, warnings = told(waits, caplog)
    assert len(warnings) == warns
    assert not warns or ("22 % of the time" in warnings[0] and "dataset.num_workers" in warnings[0])


def test_the_slowest_and_the_largest_worker_count(monkeypatch):
    """Rank 0 tells what rank 1 has waited and taken."""
    monkeypatch.setattr("upsnet.engine.train.peak_memory", lambda device: 100.0 + number())
    log = Recorder()

    def number():
        return int(threading.current_thread().name.rsplit("_", 1)[1])

    def slowly():
        for batch in batches(4):
            time.sleep(0.2 * number())
            yield batch

    def work(workers):
        network = Toy()
        options = replace(OPTIONS, max_iteration=1)
        own = log if number() == 0 else None
        workers.rank = number()
        train(network, slowly(), build_optimizer(network), options, log=own, workers=workers)

    together(2, work)
    assert log.lines[0]["memory"] == 101.0 and log.lines[0]["data_seconds"] >= 0.2 / 8


def test_peak_memory_stays_when_memory_is_given_back():
    device = torch.device("cpu")
    before = peak_memory(device)
    block = torch.ones(1 << 27, dtype=torch.uint8)
    after = peak_memory(device)
    del block
    assert 10 < before < after + 1 and abs(peak_memory(device) - after) < 1  # the system counts in rough steps
