"""Which convention a ResNet has is known, not guessed."""

import hashlib
from pathlib import Path

import pytest
import safetensors.torch
import torch

from upsnet.checkpoints import conventions
from upsnet.checkpoints.conventions import known_convention
from upsnet.checkpoints.files import Kind, read_weights
from upsnet.checkpoints.manifest import KnownFile, Source
from upsnet.structures.errors import WeightsError

RESNET = {"conv1.weight": torch.zeros(64, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}


def resnet(path: Path, **entries):
    """A file with the names of a ResNet; entries stand beside the tensors."""
    torch.save({**RESNET, **entries}, path)
    file = read_weights(path)
    assert file.kind is Kind.RESNET
    return file


def checksum(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def found(file, asked=None):
    known = known_convention(file, asked)
    return known and (known.convention, known.source)


@pytest.mark.parametrize("name", ["resnet-50-caffe.pth", "resnet-101-caffe.pth"])
def test_the_files_of_the_recipes(tmp_path, name):
    assert found(resnet(tmp_path / name)) == ("caffe", "its name")


def test_torchvision_by_its_name_which_holds_the_checksum(tmp_path):
    path = tmp_path / "w.pth"
    resnet(path)
    named = path.rename(tmp_path / f"resnet50-{checksum(path)[:8]}.pth")
    assert found(read_weights(named)) == ("torchvision", "its name, which holds its checksum")
    with pytest.raises(WeightsError, match=r"resnet50-0676ba61.pth has the checksum .* rename it and set network\."):
        known_convention(read_weights(named.rename(tmp_path / "resnet50-0676ba61.pth")))


def test_the_checksum_counts_more_than_the_name(tmp_path, monkeypatch):
    path = tmp_path / "resnet-50-caffe.pth"
    resnet(path)
    source = Source("https://host/x.pth", sha256=checksum(path)[:8])  # sometimes only the beginning is known
    known = KnownFile("x/torchvision.pth", "g", "resnet", "torchvision", "BSD", (source,))
    monkeypatch.setattr(conventions, "known_files", lambda: (known,))
    assert found(read_weights(path)) == ("torchvision", "its checksum, that of torchvision.pth")


def test_the_files_own_word(tmp_path):
    assert found(resnet(tmp_path / "w.pth", convention="torchvision")) == ("torchvision", "the file's own word")
    torch.save({"state_dict": RESNET, "convention": "caffe"}, tmp_path / "v.pth")
    assert found(read_weights(tmp_path / "v.pth")) == ("caffe", "the file's own word")
    safetensors.torch.save_file(RESNET, tmp_path / "w.safetensors", {"convention": "torchvision"})
    assert found(read_weights(tmp_path / "w.safetensors")) == ("torchvision", "the file's own word")
    with pytest.raises(WeightsError, match="'keras': it must be one of caffe, torchvision"):
        known_convention(resnet(tmp_path / "w.pth", convention="keras"))


def test_what_is_asked_for_counts_most(tmp_path):
    file = resnet(tmp_path / "resnet-50-caffe.pth", convention="caffe")
    assert found(file, "torchvision") == ("torchvision", "network.pretrained_convention")


@pytest.mark.parametrize("name", ["w.pth", "resnet50.pth", "resnet-50.pth", "caffe.pth", "resnet50-abc.pth"])
def test_nothing_is_guessed(tmp_path, name):
    assert known_convention(resnet(tmp_path / name)) is None
