import os
import sys
from types import ModuleType

import pytest
import torch

from upsnet import builders
from upsnet.builders.workers import launch_of, launcher_of
from upsnet.commands import launch
from upsnet.commands.startup import say_how_many_workers
from upsnet.config import load_recipe
from upsnet.engine.workers import SingleWorker
from upsnet.structures.errors import RecipeError

TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
HOROVODRUN = {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_RANK": "0"}


def recipe(*changes):
    return load_recipe("upsnet_resnet18_shapes", changes)


@pytest.fixture
def gpus(monkeypatch):
    """Four, in name."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


def test_the_launcher_shows_in_the_environment():
    assert launcher_of({}) == launcher_of({"RANK": "0", "HOME": "/"}) == "plain"
    assert launcher_of(TORCHRUN) == "torchrun"
    assert launcher_of(HOROVODRUN) == launcher_of({"HOROVOD_ELASTIC": "1"}) == "horovodrun"


def test_a_plain_launch_is_one_worker(monkeypatch):
    for name in (*TORCHRUN, *HOROVODRUN):
        monkeypatch.delenv(name, raising=False)
    for changes in ([], ["train.use_horovod=true"]):
        workers, device = builders.build_workers(recipe(*changes, "gpus='0,1'"))
        assert isinstance(workers, SingleWorker)
        assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    "environment, horovod, sentence",
    [
        (TORCHRUN, "true", "launch by torchrun, but train.use_horovod is true: add train.use_horovod=false"),
        (HOROVODRUN, "false", "launch by horovodrun, but train.use_horovod is false: add train.use_horovod=true"),
    ],
)
def test_launcher_and_recipe_must_agree(monkeypatch, environment, horovod, sentence):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=sentence):
        builders.build_workers(recipe(f"train.use_horovod={horovod}"))


def test_horovodrun_without_horovod_says_what_to_run(monkeypatch):
    for name, value in HOROVODRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delitem(sys.modules, "upsnet.engine.horovod_workers", raising=False)
    monkeypatch.setitem(sys.modules, "horovod", None)
    monkeypatch.setitem(sys.modules, "horovod.torch", None)
    with pytest.raises(RecipeError, match=r"Horovod cannot be loaded here \(.+\): run ./init.sh horovod"):
        builders.build_workers(recipe("train.use_horovod=true"))


def test_horovodrun_gives_horovods_workers(monkeypatch):
    for name, value in HOROVODRUN.items():
        monkeypatch.setenv(name, value)
    made = []
    stand_in = ModuleType("upsnet.engine.horovod_workers")
    stand_in.HorovodWorkers = lambda *arguments: made.append(arguments)
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    for kind in ("none", "fp16"):
        _, device = builders.build_workers(recipe("train.use_horovod=true", f"train.horovod_compression={kind}"))
        assert made.pop() == (device, kind)


def test_one_worker_of_a_launcher_is_no_plain_launch(monkeypatch, caplog):
    for launcher, said in (({}, True), (HOROVODRUN, False)):
        caplog.clear()
        for name, value in launcher.items():
            monkeypatch.setenv(name, value)
        with caplog.at_level("INFO", logger="upsnet"):
            say_how_many_workers(recipe("train.use_horovod=true"), 1)
        assert ("plain launch" in caplog.text) == said


def test_every_worker_of_a_launcher_has_a_gpu_of_its_own(gpus):
    assert builders.choose_device(recipe("gpus='3'"), local_rank=1) == torch.device("cuda", 1)
    with pytest.raises(
        RecipeError, match="worker 4 of this machine has no GPU of its own, 4 are here: start 4 workers"
    ):
        builders.choose_device(recipe(), local_rank=4)


def test_the_total_batch_is_kept_whatever_the_number_of_workers():
    made = recipe("train.total_batch=16", "train.batch_size=1")
    assert [builders.accumulation(made, workers) for workers in (1, 2, 4, 8, 16)] == [16, 8, 4, 2, 1]
    for workers in (1, 4, 16):
        options = builders.engine_options(made, 160, workers)
        assert options.steps_per_epoch == 10 and options.accumulation * workers == 16
    with pytest.raises(RecipeError, match=r"total_batch \(16\) is no multiple of workers × batch_size \(3 × 1\)"):
        builders.engine_options(made, 160, 3)


def test_a_plain_launch_on_several_gpus_becomes_one_by_torchrun(gpus, monkeypatch):
    ran = []
    monkeypatch.setattr(launch.os, "execve", lambda *arguments: ran.append(arguments))
    monkeypatch.setattr(sys, "argv", ["upsnet/upsnet_end2end_train.py", "--cfg", "x.yaml", "gpus='1,3'"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    launch.launch_on_several_gpus(recipe("gpus='1,3'"), for_training=True)
    ((program, command, environment),) = ran
    assert program == command[0] == sys.executable and environment["CUDA_VISIBLE_DEVICES"] == "5,7"
    assert command[1:] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *sys.argv]
    assert launch.torchrun_command(2, ["/x/upsnet/__main__.py", "train"])[-3:] == ["-m", "upsnet", "train"]


def test_it_does_not_with_one_gpu_for_horovod_or_inside_a_launch(gpus, monkeypatch):
    monkeypatch.setattr(launch.os, "execve", lambda *arguments: pytest.fail("started again"))
    launch.launch_on_several_gpus(recipe("gpus='1'"), for_training=True)
    launch.launch_on_several_gpus(recipe("gpus='0,1'", "train.use_horovod=true"), for_training=True)
    with pytest.raises(RecipeError, match="gpus: device 5 is not there, this machine has 4: add gpus='0,1,2,3'"):
        launch.launch_on_several_gpus(recipe("gpus='0,5'"), for_training=True)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    launch.launch_on_several_gpus(recipe("gpus='0,1'"), for_training=True)


def test_a_launch_by_torchrun_knows_its_own_workers_of_before():
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    job, again = torchrun | {"TORCHELASTIC_RUN_ID": "job"}, {"TORCHELASTIC_RESTART_COUNT": "2"}
    assert launch_of({}) == launch_of({"TORCHELASTIC_RUN_ID": "job"} | again) == ((), ())
    (agent, name), earlier = launch_of(job)
    assert agent.startswith("job:") and agent.endswith(f":{os.getppid()}") and name == "job"
    assert earlier == [agent], "another launch may have been given the name, too; a machine that comes is no restart"
    assert launch_of(job | again).earlier == [agent, "job"], "rank 0 may be on another machine than before"
    nameless = launch_of(torchrun | {"TORCHELASTIC_RUN_ID": "none"} | again)
    assert nameless == launch_of(torchrun) and list(nameless.names) == list(nameless.earlier) != [agent]
