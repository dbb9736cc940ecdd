"""The two conventions of pretrained ResNets. Tensors do not show them: a file runs in either, badly in the wrong one.

caffe: a bottleneck's stride lies in its first 1×1 convolution; the input is BGR, 0..255, minus means.
torchvision: it lies in the 3×3; the input is RGB, 0..1, minus means and divided by deviations.
"""

import re
from dataclasses import dataclass
from typing import get_args

from upsnet.checkpoints.files import WeightFile
from upsnet.checkpoints.lock import sha256_of
from upsnet.checkpoints.manifest import Convention, known_file, known_files
from upsnet.structures.errors import WeightsError

WORDS: dict[Convention, str] = {
    "caffe": "stride in the first 1×1, input BGR 0..255 minus means",
    "torchvision": "stride in the 3×3, input RGB 0..1 normalised",
}

_TORCHVISION_NAME = re.compile(r"resnet\d+-([0-9a-f]{8})\.pth")


@dataclass(frozen=True, slots=True)
class KnownConvention:
    """convention: which. source: where it is known from, in words."""

    convention: Convention
    source: str


def known_convention(file: WeightFile, asked: Convention | None = None) -> KnownConvention | None:
    """The convention of a ResNet: as asked for, as the file itself says, or by its checksum or name; None: unknown.

    Raises:
        WeightsError: the file says something else than a convention, or has a name of torchvision's with the checksum
            of another file.
    """
    if asked is not None:
        return KnownConvention(asked, "network.pretrained_convention")
    if file.convention is not None:
        for convention in get_args(Convention):
            if file.convention == convention:
                return KnownConvention(convention, "the file's own word")
        raise WeightsError(
            f"{file.path}: its convention is '{file.convention}': it must be one of {', '.join(get_args(Convention))}; "
            f"set network.pretrained_convention"
        )
    checksum = sha256_of(file.path)
    for known in known_files():
        if known.convention and any(s.sha256 and checksum.startswith(s.sha256) for s in known.sources):
            return KnownConvention(known.convention, f"its checksum, that of {known.name}")
    if named := _TORCHVISION_NAME.fullmatch(file.path.name):
        if not checksum.startswith(named[1]):
            raise WeightsError(
                f"{file.path} has the checksum {checksum[:8]}…, not the one in its name, so it is damaged or another "
                f"file: download it again, or rename it and set network.pretrained_convention"
            )
        return KnownConvention("torchvision", "its name, which holds its checksum")
    named_like = known_file(file.path.name)
    if named_like is not None and named_like.convention:
        return KnownConvention(named_like.convention, "its name")
    return None
