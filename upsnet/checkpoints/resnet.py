"""ResNets of caffe and torchvision: the names of their layers and ours."""

from upsnet.checkpoints.names import NameTable

_BLOCK, _OUR_BLOCK = "layer{stage-1}.{block}", "backbone.res{stage}.{block}"

_NAMES = NameTable(
    ("conv1", "backbone.stem.conv"),
    ("bn1", "backbone.stem.norm"),
    (f"{_BLOCK}.conv{{n}}", f"{_OUR_BLOCK}.conv{{n}}"),
    (f"{_BLOCK}.bn{{n}}", f"{_OUR_BLOCK}.norm{{n}}"),
    (f"{_BLOCK}.downsample.0", f"{_OUR_BLOCK}.downsample.conv"),
    (f"{_BLOCK}.downsample.1", f"{_OUR_BLOCK}.downsample.norm"),
)


def our_name(name: str) -> str | None:
    """Our name of a ResNet's tensor: `layer1.0.bn2.bias` → `backbone.res2.0.norm2.bias`; None: no such layer."""
    return _NAMES.to_right(name)
