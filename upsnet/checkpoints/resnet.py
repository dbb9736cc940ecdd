"""ResNets of caffe and torchvision: the names of their layers and ours."""

import re
from collections.abc import Mapping

from torch import Tensor

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


def to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet's tensors by our names, without its classifier and its counters; unknown names stay as they are.

    A convolution's bias, which copies of the caffe release have, goes into the mean of the norm behind it.
    """
    ours = {
        our_name(name) or name: tensor
        for name, tensor in state.items()
        if not name.startswith("fc.") and not name.endswith(".num_batches_tracked")
    }
    for name in list(ours):
        if match := re.fullmatch(r"(backbone\..*)conv(\d?)\.bias", name):
            mean = f"{match[1]}norm{match[2]}.running_mean"
            if mean in ours:
                ours[mean] = ours[mean] - ours.pop(name)
    return ours
