"""The command lines as a user types them: help, exit codes, both scripts from a plain checkout."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import copy_run, upsnet, write_tiny

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("upsnet_end2end_train.py", "upsnet_end2end_test.py")
DATA_SETS = ("prepare coco", "prepare cityscapes")
COMMANDS = (
    *("train", "test", "predict", "evaluate", "report", "weights", "download-weights", "shapes", "demo", "prepare"),
    *DATA_SETS,
)


def python(*arguments, cwd):
    """A fresh interpreter that does not know the repository."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the package with a recipe that only this copy has, so that nothing else can have served."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "upsnet", folder / "upsnet", ignore=shutil.ignore_patterns("__pycache__"))
    recipe = write_tiny(folder)
    recipe.rename(folder / "upsnet" / "experiments" / "only_here.yaml")
    return folder


def test_both_scripts_run_from_a_plain_checkout(checkout, tmp_path):
    train, test = (Path("upsnet") / script for script in SCRIPTS)
    trained = python(train, "--cfg", "upsnet/experiments/only_here.yaml", "train.max_iteration=1", cwd=checkout)
    assert trained.returncode == 0, trained.stderr
    weights = checkout / "out/only_here/train/tiny_1.pth"
    assert f"saved {weights}" in trained.stderr and weights.is_file()
    tested = python(
        checkout / test, "--cfg", "only_here", "--weight_path", weights, "test.max_det=5", "dataset.limit=2",
        cwd=tmp_path,
    )  # fmt: skip
    assert tested.returncode == 0, tested.stderr
    assert "All" in tested.stdout and (checkout / "out/only_here/val/results/summary.json").is_file()


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_fail_with_a_sentence(script, checkout, tmp_path):
    ran = python(checkout / "upsnet" / script, "--cfg", "nowhere.yaml", cwd=tmp_path)
    assert ran.returncode == 2 and re.fullmatch(rf"{script}: error: recipe nowhere.yaml is not .*\n", ran.stderr)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_scripts_explain_themselves(script, elsewhere, checkout, tmp_path):
    cwd, path = (tmp_path, checkout / "upsnet" / script) if elsewhere else (checkout, Path("upsnet") / script)
    shown = python(path, "--help", cwd=cwd)
    assert shown.returncode == 0 and "--cfg YAML" in shown.stdout and "key=value" in shown.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    ran = upsnet(*command.split(), "--help")
    assert ran.code == 0 and f"usage: upsnet {command}" in ran.out


def test_the_list_of_commands(checkout):
    shown = python("-m", "upsnet", "--help", cwd=checkout)
    assert shown.returncode == 0 and all(
        re.search(rf"\n    {command}\s", shown.stdout) for command in COMMANDS if " " not in command
    )


@pytest.mark.parametrize(
    "arguments, fragment",
    [
        ([], "COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "--cfg"),
        (["predict", "--cfg", "upsnet_resnet18_shapes", "--weight_path", "x.pth", "--out", "o"], "PHOTO"),
        (["shapes", "--out", "o", "--train", "many"], "--train"),
        (["train", "--cfg", "upsnet_resnet18_shapes", "train.lr"], "key=value"),
        (["train", "--cfg", "upsnet_resnet18_shapes", "train.lr=[1"], "train.lr=[1"),
        (["shapes", "--out", "o", "--train", "-1"], "must not be negative"),
        (["shapes", "--out", "o", "seed=3"], "'seed=3'"),
        (["train", "--cfg", "upsnet_resnet18_shapes", "--epochs", "3"], "'--epochs'"),
        (["train", "seed=1", "--cfg", "upsnet_resnet18_shapes", "lr"], "'lr': a change to the recipe has the form"),
        (["train", "seed=1", "--cfg", "upsnet_resnet18_shapes", "train.ls=1"], "unknown key 'train.ls'"),
        (
            ["predict", "--cfg", "upsnet_resnet18_shapes", "--weight_path", "x.pth", "--out", "o", "seed=1"],
            "at least one PHOTO",
        ),
    ],
)
def test_wrong_command_lines(arguments, fragment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = upsnet(*arguments)
    assert ran.code == 2 and len(ran.errors) == 1 and fragment in ran.errors[0]
    assert not list(tmp_path.iterdir())


def test_threads_sleep_while_they_wait(monkeypatch):
    """Set before a command imports torch, which reads it then; what the user has set stays."""
    for given, expected in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.delenv("OMP_WAIT_POLICY") if given is None else monkeypatch.setenv("OMP_WAIT_POLICY", given)
        upsnet("train", "--cfg", "nowhere")
        assert os.environ["OMP_WAIT_POLICY"] == expected


def test_a_training_takes_the_arguments_of_a_test(tmp_path):
    """The original has one parser for both, so that command lines may carry them."""
    ran = upsnet("train", "--cfg", write_tiny(tmp_path), "--eval_only", "--weight_path", "x.pth", "dataset.limit=0")
    assert ran.code == 2 and "dataset.limit" in ran.errors[0]


@pytest.fixture
def called(monkeypatch):
    """What reaches the commands instead of being done."""
    from upsnet import commands

    calls = []
    for name in ("train", "test", "predict", "report", "demo"):
        monkeypatch.setattr(commands, name, lambda *arguments: calls.append(arguments))
    return calls


@pytest.mark.parametrize("command", ["test", "report"])
def test_overrides_may_stand_anywhere(command, called):
    option = {"test": ["--weight_path", "w.pth"], "report": ["--out", "o"]}[command]
    ran = upsnet(command, "seed=1", "--cfg", "upsnet_resnet18_shapes", "test.max_det=7", *option, "test.scales=[96]")
    ((recipe, *_),) = called
    assert ran.code == 0 and (recipe.seed, recipe.test.max_det, recipe.test.scales) == (1, 7, (96,))


def test_later_overrides_win_over_earlier_ones(called):
    upsnet("test", "seed=1", "--cfg", "upsnet_resnet18_shapes", "seed=2", "--eval_only", "seed=3")
    ((recipe, weights, eval_only),) = called
    assert (recipe.seed, weights, eval_only) == (3, None, True)


def test_photos_and_overrides_of_a_prediction(called):
    upsnet(
        "predict", "a.jpg", "test.scales=[96]", "--cfg", "upsnet_resnet18_shapes", "./b=1.jpg", "--weight_path",
        "w.pth", "--out", "o", "seed=5", "Photo=2.jpg",
    )  # fmt: skip
    ((recipe, weights, photos, out),) = called
    assert (recipe.seed, recipe.test.scales) == (5, (96,)) and (weights, out) == (Path("w.pth"), Path("o"))
    assert photos == [Path("a.jpg"), Path("b=1.jpg"), Path("Photo=2.jpg")]


def test_a_training_says_that_it_does_not_use_weights_to_test(called, caplog):
    upsnet("train", "--cfg", "upsnet_resnet18_shapes", "--weight_path", "w.pth", "network.pretrained=p.pth")
    (said,) = [record.message for record in caplog.records if "--weight_path" in record.message]
    assert "w.pth is for testing" in said and "network.pretrained (p.pth)" in said and len(called) == 1
    upsnet("train", "--cfg", "upsnet_resnet18_shapes")
    assert caplog.text.count("--weight_path") == 1


def test_an_interruption_is_no_crash(monkeypatch):
    from upsnet import commands

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "shapes", interrupted)
    ran = upsnet("shapes", "--out", "o")
    assert ran.code == 130 and ran.err == "upsnet: interrupted\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    from upsnet import commands

    monkeypatch.setattr(commands, "shapes", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        upsnet("shapes", "--out", "o")


def test_an_error_stands_on_a_line_of_its_own(tiny_run, tmp_path):
    """Also behind a progress bar that it broke off."""
    recipe = copy_run(tiny_run, tmp_path)
    (tmp_path / "data/annotations/panoptic_val/000000000024.png").unlink()
    ran = upsnet("test", "--cfg", recipe)
    last = ran.err.splitlines()[-1]
    assert last.startswith("upsnet: error: image 24: ") and ran.err.count("error:") == 1
    assert ran.err.split("\n")[-2] == last, "the bar has ended its line"
