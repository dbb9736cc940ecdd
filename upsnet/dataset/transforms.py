"""From a photo and its labels to what the network sees: scale, mean subtraction, resizing, targets.

Everything is resized with the scale factor itself as the step of the sampling grid, not with the ratio of the rounded
sizes: the original UPSNet does so, and its weights expect it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from upsnet.structures.draws import SeededDraws
from upsnet.structures.errors import DataError
from upsnet.structures.masks import Masks
from upsnet.structures.pixel_means import PIXEL_MEANS

_TORCHVISION_MEANS, _TORCHVISION_DEVIATIONS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class Transform:
    """How photos become network inputs.

    scales: short sides in network pixels, one of which is drawn per image and step. max_size: upper limit of the long
    side. pixel_means: B, G, R. use_caffe_model: see `normalize`. seed: of the drawn scales.
    """

    scales: Sequence[int]
    max_size: int
    pixel_means: tuple[float, float, float] = PIXEL_MEANS
    use_caffe_model: bool = True
    seed: int = 0

    def scale(self, height: int, width: int, image_id: int, step: int = 0, flipped: bool = False) -> float:
        """Network pixels per photo pixel: a function of the seed, the step and the image alone.

        Raises:
            DataError: the photo is so thin that nothing would be left of it.
        """
        choice = 0
        if len(self.scales) > 1:
            choice = SeededDraws(self.seed, step, image_id, int(flipped)).integer(len(self.scales))
        scale = network_scale(height, width, self.scales[choice], self.max_size)
        if min(scaled_size(height, width, scale)) < 1:
            raise DataError(
                f"image {image_id}: {height}×{width} pixels (height × width) are too long and thin: nothing would be "
                f"left of the short side at a long side of {self.max_size}"
            )
        return scale

    def image(self, photo: NDArray[np.uint8], scale: float) -> Tensor:
        """H×W×3 uint8 RGB photo → 3×h×w float32 network input, without padding."""
        return resize_photo(normalize(photo, self.pixel_means, self.use_caffe_model), scale)

    def picture(self, image: Tensor) -> NDArray[np.uint8]:
        """What the network sees as a picture: 3×h×w network input → h×w×3 uint8 RGB."""
        values = image.permute(1, 2, 0).numpy()
        if self.use_caffe_model:
            rgb = (values + np.asarray(self.pixel_means, np.float32))[..., ::-1]
        else:
            rgb = (values * np.array(_TORCHVISION_DEVIATIONS) + np.array(_TORCHVISION_MEANS)) * 255
        return np.ascontiguousarray(rgb.round().clip(0, 255).astype(np.uint8))


def network_scale(height: int, width: int, short_side: int, max_size: int) -> float:
    """The factor that brings the short side to `short_side`, unless the long side would then exceed `max_size`."""
    scale = short_side / min(height, width)
    if round(scale * max(height, width)) > max_size:
        scale = max_size / max(height, width)
    return scale


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Height and width after resizing (half rounds to even)."""
    return round(height * scale), round(width * scale)


def padded_size(size: tuple[int, int], stride: int = 32) -> tuple[int, int]:
    """The next multiples of `stride`."""
    height, width = size
    return -(-height // stride) * stride, -(-width // stride) * stride


def normalize(
    photo: NDArray[np.uint8], pixel_means: tuple[float, float, float], use_caffe_model: bool
) -> NDArray[np.float32]:
    """H×W×3 uint8 RGB → H×W×3 float32, as the pretrained ResNet wants it.

    With a caffe model: BGR minus the means. Otherwise: RGB in 0..1, minus torchvision's means and divided by its
    deviations. (The original applies those numbers of red to blue and the other way round; no released weights do.)
    """
    height, width, _ = photo.shape

    def in_each_pixel(values: tuple[float, float, float]) -> NDArray[np.float32]:
        return np.tile(np.asarray(values, np.float32), width)  # of a row: numpy is slow on three values at a time

    if use_caffe_model:
        rows = cv2.cvtColor(photo, cv2.COLOR_RGB2BGR).reshape(height, -1)
        normalized = np.subtract(rows, in_each_pixel(pixel_means), dtype=np.float32)
    else:
        normalized = np.divide(photo.reshape(height, -1), np.float32(255), dtype=np.float32)
        normalized -= in_each_pixel(_TORCHVISION_MEANS)
        normalized /= in_each_pixel(_TORCHVISION_DEVIATIONS)
    return normalized.reshape(height, width, 3)


def resize_photo(image: NDArray[np.float32], scale: float) -> Tensor:
    """H×W×3 float32 → 3×h×w, bilinear; in memory the channels are innermost."""
    resized = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    return torch.from_numpy(resized).permute(2, 0, 1)


def resize_labels(labels: NDArray[np.int16], scale: float) -> NDArray[np.int16]:
    """H×W int16 → h×w, nearest neighbour."""
    return np.asarray(cv2.resize(labels, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST), dtype=np.int16)


def quarter_masks(masks: Masks, size: tuple[int, int], scale: float) -> NDArray[np.bool_]:
    """Instance masks at a quarter of the network's resolution: n×round(h/4)×round(w/4).

    As in the original a mask is drawn on a canvas of the photo's size as computed back from the network's, brought to
    network scale and then to a quarter, both by nearest neighbour.

    Args:
        size: height and width (h, w) at network scale. scale: network pixels per photo pixel.
    """
    height, width = round(size[0] / scale), round(size[1] / scale)
    rows, columns = _quarter_positions(height, scale), _quarter_positions(width, scale)
    # Only the pixels that survive both steps are looked up; no mask is resized.
    planes = [mask.draw(height, width)[rows].take(columns, axis=1) for mask in masks]
    return np.stack(planes) if planes else np.zeros((0, len(rows), len(columns)), dtype=bool)


def _quarter_positions(length: int, scale: float) -> NDArray[np.int64]:
    """Which of `length` pixels remain after resizing by scale and then by 1/4, asked of OpenCV itself."""
    positions: NDArray[Any] = np.arange(length, dtype=np.float32)[None]
    for factor in (scale, 0.25):
        if round(positions.size * factor) == 0:
            return np.zeros(0, dtype=np.int64)
        positions = cv2.resize(positions, None, fx=factor, fy=1, interpolation=cv2.INTER_NEAREST)
    return positions[0].astype(np.int64)
