"""ResNets of caffe and torchvision: the names of their layers and ours."""

import re
from collections.abc import Mapping

from torch import Tensor

from upsnet.checkpoints.names import NameTable

OUR_BLOCK = "backbone.res{stage}.{block}"


def layers(stem: str, block: str) -> tuple[tuple[str, str], ...]:
    """The layers of a ResNet beside ours, for a `NameTable`.

    Args:
        stem, block: how the names of the stem's layers begin, and those of a block `{block}` of stage `{stage}`.
    """
    return (
        (f"{stem}conv1", "backbone.stem.conv"),
        (f"{stem}bn1", "backbone.stem.norm"),
        (f"{block}.conv{{n}}", f"{OUR_BLOCK}.conv{{n}}"),
        (f"{block}.bn{{n}}", f"{OUR_BLOCK}.norm{{n}}"),
        (f"{block}.downsample.0", f"{OUR_BLOCK}.downsample.conv"),
        (f"{block}.downsample.1", f"{OUR_BLOCK}.downsample.norm"),
    )


_NAMES = NameTable(*layers(stem="", block="layer{stage-1}.{block}"))


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
