"""Small weight files, and entries of a manifest for them."""

import hashlib
import io

import torch

from upsnet.checkpoints.manifest import KnownFile


def saved(state):
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


RESNET = saved({"conv1.weight": torch.ones(4, 3, 7, 7), "layer1.0.conv1.weight": torch.ones(4, 4, 1, 1)})
OTHER_RESNET = saved({"conv1.weight": torch.ones(4, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(4, 4, 1, 1)})
RELEASED = saved({"resnet_backbone.conv1.conv1.weight": torch.ones(4, 3, 7, 7)})
PAGE = b"<!DOCTYPE html><html>404, nicely</html>"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def resnet(*sources, name="resnet-50-caffe.pth"):
    return KnownFile(f"pretrained_model/{name}", "imagenet", "resnet", "caffe", "MIT", sources)


def place(file, model, content):
    path = model / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def files_in(model):
    return sorted(str(path.relative_to(model)) for path in model.rglob("*") if path.is_file())
