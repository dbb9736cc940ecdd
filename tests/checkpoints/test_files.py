import io
import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from upsnet.checkpoints.files import Kind, read_weights
from upsnet.structures.errors import WeightsError

STATE = {"a.weight": torch.arange(300.0), "a.bias": torch.ones(3, dtype=torch.float64), "count": torch.tensor(7)}


def torch_bytes(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


LEGACY = {"_use_new_zipfile_serialization": False}


def write(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_both_formats_of_torch(tmp_path, options):
    read = read_weights(write(tmp_path / "w.pth", torch_bytes(OrderedDict(STATE), **options)))
    assert read.categories is None
    assert read.state.keys() == STATE.keys()
    assert torch.equal(read.state["a.weight"], STATE["a.weight"])
    assert [tensor.dtype for tensor in read.state.values()] == [torch.float32, torch.float32, torch.int64]


def test_safetensors(tmp_path):
    safetensors.torch.save_file(STATE, tmp_path / "w.safetensors")
    read = read_weights(tmp_path / "w.safetensors")
    assert torch.equal(read.state["a.weight"], STATE["a.weight"])


def test_the_container_shows_in_the_content_not_in_the_name(tmp_path):
    safetensors.torch.save_file(STATE, tmp_path / "w.pth")
    read = read_weights(tmp_path / "w.pth")
    assert read.format == "safetensors" and read.state.keys() == STATE.keys()
    for options, container in (({}, "torch"), (LEGACY, "torch before 1.6")):
        assert read_weights(write(tmp_path / "w.bin", torch_bytes(STATE, **options))).format == container


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("landmark, kind", [
    ("resnet_backbone.conv1.conv1.weight", Kind.RELEASED), ("backbone.stem.conv.weight", Kind.OURS),
    ("layer1.0.conv1.weight", Kind.RESNET), ("encoder.weight", Kind.UNKNOWN),
])  # fmt: skip
def test_the_names_tell_the_kind(tmp_path, wrapper, prefix, landmark, kind):
    state = {f"{prefix}{landmark}": torch.ones(2)}
    for content in (state, {wrapper: state, "epoch": 3, "optimizer": {"lr": 0.1}}):
        read = read_weights(write(tmp_path / "w.pth", torch_bytes(content)))
        assert read.kind is kind and len(read.state) == 1 and read.categories is None and read.recipe is None


def test_what_our_files_keep_beside_the_weights(tmp_path):
    categories = [{"id": 4, "name": "cat", "isthing": 1}]
    record = {"weights": STATE, "categories": categories, "recipe": "seed: 2", "format_version": 1}
    read = read_weights(write(tmp_path / "w.pth", torch_bytes(record)))
    assert [c.name for c in read.categories] == ["cat"] and read.recipe == "seed: 2" and read.iteration is None
    assert read_weights(write(tmp_path / "w.pth", torch_bytes({**record, "iteration": 5}))).iteration == 5


@pytest.mark.parametrize("record, message", [("{", "is no json"), ('{"format_version": 99}', "format version 99")])
def test_records_of_safetensors(tmp_path, record, message):
    safetensors.torch.save_file(STATE, tmp_path / "w.safetensors", {"upsnet": record})
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path / "w.safetensors")


def test_half_precision_module_prefix_and_things_that_are_no_tensors(tmp_path):
    content = {
        "module.a": torch.tensor([0.1], dtype=torch.float16), "b": nn.Parameter(torch.ones(1, dtype=torch.bfloat16)),
        "epoch": 3, "best": np.float64(0.5), "name": "x",
    }  # fmt: skip
    for options in ({}, LEGACY):
        read = read_weights(write(tmp_path / "w.pth", torch_bytes(content, **options)))
        assert read.state.keys() == {"a", "b"}
        assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in read.state.values())
        assert read.state["a"].item() == torch.tensor(0.1).half().item()


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64, np.bool_, np.uint8])
def test_numpy_scalars_are_harmless(tmp_path, dtype):
    data = torch_bytes({"a": torch.ones(1), "n": dtype(1)})
    # Files written with numpy 1 name the constructor's old home.
    for home in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        path = write(tmp_path / "w.pth", torch_bytes({"a": torch.ones(1), "n": dtype(1)}, **LEGACY).replace(
            b"numpy._core.multiarray", home))  # fmt: skip
        assert read_weights(path).state.keys() == {"a"}
    assert read_weights(write(tmp_path / "w.pth", data)).state.keys() == {"a"}


class RunsCode:
    def __reduce__(self):
        return os.system, ("echo ran > ran",)


ZIP, OLD = torch_bytes(STATE), torch_bytes(STATE, **LEGACY)
OURS = {"weights": STATE, "format_version": 1}
CHANGED = ZIP.replace(torch.arange(300.0).numpy().tobytes(), torch.arange(1, 301.0).numpy().tobytes())
assert CHANGED != ZIP
FAULTS = {
    "text": (b"hello, I am a text file\n", "not a weight file: it begins with b'hello"),
    "web page": (b"<!DOCTYPE html><html>", "not a weight file"),
    "empty": (b"", "not a weight file"),
    "other pickle": (pickle.dumps({"a": 1}), "not a weight file"),
    "zip without end": (ZIP[: len(ZIP) // 2], "cut off or damaged"),
    "zip of which bytes changed": (CHANGED, "cut off or damaged"),
    "zip without its last bytes": (ZIP[:-10], "cut off or damaged"),
    "legacy without end": (OLD[: len(OLD) // 2], "cut off or damaged"),
    "legacy, only the start": (OLD[:80], "cut off or damaged"),
    "legacy without its last bytes": (OLD[:-10], "cut off or damaged"),
    "code": (torch_bytes({"a": RunsCode()}), r"more than tensors and may run code \((posix|nt)\.system\)"),
    "code, legacy": (torch_bytes({"a": RunsCode()}, **LEGACY), r"may run code \((posix|nt)\.system\)"),
    "NaN": (torch_bytes({"fine": torch.ones(2), "bad.weight": torch.tensor([1, torch.nan])}), "NaN .* bad.weight"),
    "infinity": (torch_bytes({"bad": torch.tensor([-torch.inf], dtype=torch.float16)}), "infinite .* bad"),
    "too large for float32": (torch_bytes({"bad": torch.tensor([1e300], dtype=torch.float64)}), "infinite .* bad"),
    "float8, NaN": (torch_bytes({"bad": torch.tensor([torch.nan]).to(torch.float8_e4m3fn)}), "NaN .* bad"),
    "sparse": (torch_bytes({"bad": torch.ones(2).to_sparse()}), "something else than real numbers in bad"),
    "complex": (torch_bytes({"bad": torch.ones(2, dtype=torch.complex64)}), "something else than real numbers in bad"),
    "without memory": (torch_bytes({"bad": torch.ones(2, device="meta")}), "something else than real numbers in bad"),
    "no tensors": (torch_bytes({"epoch": 3}), "no tensors by name"),
    "a list": (torch_bytes([torch.ones(1)]), "no tensors by name"),
    "from the future": (torch_bytes({"weights": STATE, "format_version": 99}), "format version 99"),
    "recipe of another type": (torch_bytes({**OURS, "recipe": 7}), "entry 'recipe' is 7"),
    "step of another type": (torch_bytes({**OURS, "iteration": "x"}), "entry 'iteration' is 'x'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_in_one_sentence(tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    data, message = FAULTS[fault]
    path = write(tmp_path / "w.pth", data)
    with pytest.raises(WeightsError, match=message) as caught:
        read_weights(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_missing_released_file_names_the_command(tmp_path):
    with pytest.raises(WeightsError, match=r"check the path, or run \./download_weights\.sh coco$"):
        read_weights(tmp_path / "upsnet_resnet_50_coco_90000.pth")


def test_missing_files_and_folders(tmp_path):
    for name in ("w.pth", "w.safetensors"):
        with pytest.raises(WeightsError, match=rf"there is no weight file .*{name}"):
            read_weights(tmp_path / name)
        (tmp_path / name).mkdir()
        with pytest.raises(WeightsError, match="cannot be read"):
            read_weights(tmp_path / name)


def test_faults_of_safetensors(tmp_path):
    data = safetensors.torch.save(STATE)
    for damaged in (b"", data[:5], data[:-5], b"text that is no header at all"):
        with pytest.raises(WeightsError, match="cut off or no safetensors"):
            read_weights(write(tmp_path / "w.safetensors", damaged))
    safetensors.torch.save_file({"bad": torch.tensor([torch.nan])}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="NaN"):
        read_weights(tmp_path / "w.safetensors")
