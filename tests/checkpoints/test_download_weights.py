"""`upsnet download-weights` and `./download_weights.sh`: groups, single files, the list, what is said."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints.served import OTHER_RESNET, RELEASED, RESNET, files_in, place, resnet, sha256
from tests.tiny import upsnet
from upsnet.checkpoints import download_weights
from upsnet.checkpoints.manifest import KnownFile, Source

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def manifest(web, monkeypatch):
    """Two groups of files on the test's server."""
    files = [
        resnet(Source(web.url("/a.pth"), sha256=sha256(RESNET))),
        resnet(Source(web.url("/b.pth")), name="resnet-101-caffe.pth"),
        KnownFile("upsnet.pth", "coco", "upsnet", None, "Non-Commercial", (Source(web.url("/u.pth")),)),
    ]
    monkeypatch.setattr(download_weights, "known_files", lambda: tuple(files))
    monkeypatch.setattr(
        download_weights, "groups", lambda: {"imagenet": "ResNets (MIT)", "coco": "UPSNet (Non-Commercial License)"}
    )
    web.put("/a.pth", RESNET)
    web.put("/b.pth", OTHER_RESNET)
    web.put("/u.pth", RELEASED)
    return files


def test_a_group_is_downloaded_once(manifest, web, model):
    first = upsnet("download-weights", "imagenet", "--out", model)
    assert first.code == 0, first.err
    assert files_in(model) == [
        "pretrained_model/resnet-101-caffe.pth", "pretrained_model/resnet-50-caffe.pth", "weights.lock.json",
    ]  # fmt: skip
    assert first.out.splitlines()[0] == "imagenet: ResNets (MIT)" and first.out.count("is downloaded") == 2
    second = upsnet("download-weights", "imagenet", "--out", model)
    assert second.code == 0 and second.out.count("is there") == 2 and "is downloaded" not in second.out
    assert len(web.pages["/a.pth"].asked) == len(web.pages["/b.pth"].asked) == 1 and not web.pages["/u.pth"].asked


def test_the_licence_is_said_before_a_download(manifest, model):
    ran = upsnet("download-weights", "coco", "--out", model)
    assert ran.out.splitlines() == ["coco: UPSNet (Non-Commercial License)", f"{model}/upsnet.pth is downloaded"]


def test_single_files_are_downloaded_by_name(manifest, model):
    ran = upsnet("download-weights", "resnet-50-caffe.pth", "--out", model)
    assert ran.code == 0 and files_in(model) == ["pretrained_model/resnet-50-caffe.pth"]


def test_without_an_argument_there_is_a_list(manifest, model):
    place(manifest[0], model, RESNET)
    place(manifest[2], model, RELEASED[:-5])
    ran = upsnet("download-weights", "--out", model)
    assert ran.code == 0
    table = ran.out.splitlines()
    assert table[0] == "imagenet: ResNets (MIT)" and table[1].endswith("resnet-50-caffe.pth: there")
    assert table[2].endswith("resnet-101-caffe.pth: missing") and "not usable" in table[4]
    assert "weights.lock.json" not in files_in(model), "a list changes nothing"


def test_a_failure_names_what_to_do(manifest, web, model):
    del web.pages["/a.pth"]
    ran = upsnet("download-weights", "imagenet", "--out", model)
    [error] = ran.errors
    assert ran.code == 2 and f"{model}/pretrained_model/resnet-50-caffe.pth" in error
    assert "HTTP 404" in error and "put the files at these places yourself" in error and "UPSNET_WEIGHTS_URL" in error
    assert (model / "pretrained_model/resnet-101-caffe.pth").is_file(), "the others are downloaded all the same"


def test_a_damaged_file_is_replaced_with_a_message(manifest, model):
    path = place(manifest[0], model, b"damaged")
    ran = upsnet("download-weights", "resnet-50-caffe.pth", "--out", model)
    assert ran.code == 0 and f"{path} is damaged" in ran.out and path.read_bytes() == RESNET


def test_unknown_words(model):
    ran = upsnet("download-weights", "imagnet", "--out", model)
    assert ran.code == 2 and "'imagnet' is no group" in ran.errors[0] and "cityscapes" in ran.errors[0]


def test_if_online_without_a_network(manifest, model, monkeypatch):
    monkeypatch.setattr(download_weights, "sources_of", lambda file: [Source("http://127.0.0.1:9/a.pth")])
    ran = upsnet("download-weights", "imagenet", "--if-online", "--out", model)
    assert ran.code == 0 and len(ran.out.splitlines()) == 1 and not model.exists()
    assert "no source answers" in ran.out and "./download_weights.sh imagenet" in ran.out


def test_if_online_with_a_network(manifest, model):
    ran = upsnet("download-weights", "coco", "--if-online", "--out", model)
    assert ran.code == 0 and (model / "upsnet.pth").is_file()


@pytest.mark.parametrize(
    "path, command",
    [
        ("./model/pretrained_model/resnet-50-caffe.pth", "./download_weights.sh imagenet"),
        ("model/upsnet_resnet_101_coco_pretrained_for_cityscapes.pth", "./download_weights.sh cityscapes"),
        ("/big/pretrained_model/resnet101-63fe2227.pth", "./download_weights.sh torchvision --out /big"),
        ("model/resnet-50-caffe.pth", None),
        ("resnet-50-caffe.pth", None),
        ("model/mine.pth", None),
    ],
)
def test_the_command_for_a_file(path, command):
    assert download_weights.command_for(Path(path)) == command


# -- the script --------------------------------------------------------------------------------------------------------


def script(*arguments, folder=ROOT, **variables):
    kept = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    command = ["bash", str(folder / "download_weights.sh"), *arguments]
    return subprocess.run(command, cwd="/", env={**kept, **variables}, capture_output=True, text=True)


def test_the_script_explains_itself_and_lists():
    environment = str(Path(sys.executable).parent.parent)
    helped = script("--help", VIRTUAL_ENV=environment)
    assert helped.returncode == 0 and "imagenet" in helped.stdout and "UPSNET_WEIGHTS_URL" in helped.stdout
    unknown = script("nonsense", VIRTUAL_ENV=environment)
    assert unknown.returncode == 2 and "'nonsense' is no group" in unknown.stderr


def test_the_script_before_any_set_up(tmp_path):
    shutil.copy(ROOT / "download_weights.sh", tmp_path)
    ran = script(folder=tmp_path)
    assert ran.returncode == 2 and "run ./init.sh first" in ran.stderr
