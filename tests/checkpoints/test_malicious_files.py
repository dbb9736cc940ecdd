"""Files that would run code when unpickled carelessly: refused by every reader, and nothing runs."""

import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.tiny import upsnet
from upsnet.checkpoints.files import load_safely, read_weights
from upsnet.engine.snapshots import resume
from upsnet.structures.errors import WeightsError

MARKER = "the_payload_ran"
LEGACY = {"_use_new_zipfile_serialization": False}


class Payload:
    """Pickled, a call that writes the marker file."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture(autouse=True)
def marker(tmp_path, monkeypatch):
    """The file that a payload would write; it must not be there when a test ends."""
    path = tmp_path / MARKER
    monkeypatch.chdir(tmp_path)
    yield path
    assert not path.exists()


def payloads(marker):
    return [
        Payload(os.system, f"echo ran > {marker}"),
        Payload(eval, f"open({str(marker)!r}, 'w')"),
        Payload(Path.touch, marker),
    ]


def torch_bytes(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def tar_bytes(payload):
    """The form of torch before 0.2: a tar with pickles inside."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            data = pickle.dumps(payload)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zip_bytes(payload):
    """A zip as torch writes it, its pickle replaced."""
    source, buffer = zipfile.ZipFile(io.BytesIO(torch_bytes({"a": torch.ones(2)}))), io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        for name in source.namelist():
            target.writestr(name, pickle.dumps(payload) if name.endswith("data.pkl") else source.read(name))
    return buffer.getvalue()


def files(payload):
    state = {"backbone.stem.conv.weight": torch.ones(2)}
    yield "value", torch_bytes({**state, "x": payload})
    yield "value, legacy", torch_bytes({**state, "x": payload}, **LEGACY)
    yield "wrapper", torch_bytes({"state_dict": state, "optimizer": payload})
    yield "wrapper, legacy", torch_bytes({"model": state, "optimizer": payload}, **LEGACY)
    yield "snapshot", torch_bytes({"weights": state, "categories": payload, "recipe": "", "format_version": 1})
    yield "everything", torch_bytes(payload)
    yield "its pickle replaced", zip_bytes(payload)
    yield "plain pickle", pickle.dumps(payload)
    yield "plain pickle, old protocol", pickle.dumps(payload, protocol=0)
    yield "tar", tar_bytes(payload)
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
    yield "legacy, second pickle", magic + pickle.dumps(payload)
    yield "legacy, third pickle", magic + pickle.dumps(1001) + pickle.dumps(payload)
    yield "legacy, fourth pickle", magic + pickle.dumps(1001) + pickle.dumps({}) + pickle.dumps(payload)


def test_the_payloads_are_real(marker):
    for payload in payloads(marker):
        torch.load(io.BytesIO(torch_bytes({"x": payload})), weights_only=False)
        assert marker.exists()
        marker.unlink()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".state.pth", ".txt"])
def test_every_form_under_every_name(marker, tmp_path, suffix):
    for payload in payloads(marker):
        for form, data in files(payload):
            path = tmp_path / f"w{suffix}"
            path.write_bytes(data)
            for reader in (read_weights, load_safely):
                with pytest.raises(WeightsError) as caught:
                    reader(path)
                assert str(path) in str(caught.value) and "\n" not in str(caught.value), form
            assert not marker.exists(), form


def test_the_training_state_of_a_snapshot(marker, tmp_path):
    network = nn.Linear(2, 2)
    torch.save({"weights": network.state_dict(), "format_version": 1}, tmp_path / "x_1.pth")
    for payload in payloads(marker):
        for form, data in files(payload):
            (tmp_path / "x_1.state.pth").write_bytes(data)
            with pytest.raises(WeightsError, match=r"x_1\.state\.pth"):
                resume(tmp_path / "x_1.pth", torch.optim.SGD(network.parameters(), lr=1.0))
            assert not marker.exists(), form


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_program_of_torch_is_no_weight_file(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "w.pth"))
    with pytest.raises(WeightsError, match=r"more than tensors and may run code \(TorchScript\)"):
        read_weights(tmp_path / "w.pth")


def test_the_command_refuses_in_one_sentence(marker, tmp_path):
    (tmp_path / "w.pth").write_bytes(torch_bytes({"x": payloads(marker)[0]}))
    for arguments in ((), ("--to", "original")):
        ran = upsnet("weights", tmp_path / "w.pth", *arguments)
        assert ran.code == 2 and len(ran.errors) == 1 and "may run code" in ran.errors[0] and not ran.out
