"""The one place that decodes pictures: photos and panoptic PNGs."""

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from upsnet.structures.errors import DataError
from upsnet.structures.panoptic_png import rgb_to_id

_END_OF_PNG = b"IEND\xaeB`\x82"


def read_photo(path: Path, size: tuple[int, int] | None = None, apply_exif: bool = False) -> NDArray[np.uint8]:
    """A photo as H×W×3 uint8 RGB; grey-scale, CMYK and 16-bit files are converted.

    Args:
        size: the height and width that the annotations speak of. Without it, `apply_exif` decides about rotation;
            with it, the photo is taken as stored if that fits, else rotated as its EXIF record says if that fits.

    Raises:
        DataError: the file is missing, cut off, no picture, or has another size.
    """
    data = _read_complete(path)
    photo = _decode(path, data, apply_exif and size is None)
    if size is not None and photo.shape[:2] != size:
        stored = photo.shape[:2]
        photo = _decode(path, data, True)
        if photo.shape[:2] != size:
            raise DataError(
                f"{path}: the photo has {stored[0]}×{stored[1]} pixels (height × width), the annotations say "
                f"{size[0]}×{size[1]}: photo and annotations do not belong together"
            )
    return photo


def read_segment_map(path: Path, size: tuple[int, int]) -> NDArray[np.int32]:
    """The segment ids of a panoptic PNG, H×W int32.

    Raises:
        DataError: the file is missing, cut off, not an 8-bit colour PNG, or not of this height and width.
    """
    data = _read_complete(path)
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if picture is None or picture.dtype != np.uint8 or picture.ndim != 3:
        raise DataError(f"{path}: is not an 8-bit RGB PNG, which a panoptic label must be")
    if picture.shape[:2] != size:
        height, width = picture.shape[:2]
        raise DataError(
            f"{path}: the label has {height}×{width} pixels (height × width), the annotations say "
            f"{size[0]}×{size[1]}: label and annotations do not belong together"
        )
    return rgb_to_id(np.asarray(picture[..., 2::-1], dtype=np.uint8))


def _read_complete(path: Path) -> bytes:
    """The bytes of a picture file, refused if its end is missing: decoders fill the rest with grey."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    # Neither marker can stand inside the compressed data of a JPEG, so an end must follow the last scan.
    cut_jpeg = data.startswith(b"\xff\xd8") and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")
    cut_png = data.startswith(b"\x89PNG") and _END_OF_PNG not in data
    if not data or cut_jpeg or cut_png:
        raise DataError(f"{path}: the file is cut off after {len(data)} bytes: copy or download it again")
    return data


def _decode(path: Path, data: bytes, apply_exif: bool) -> NDArray[np.uint8]:
    flags = cv2.IMREAD_COLOR if apply_exif else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    photo = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if photo is None:
        raise DataError(f"{path}: is damaged or not a picture: copy or download it again")
    return np.asarray(cv2.cvtColor(photo, cv2.COLOR_BGR2RGB), dtype=np.uint8)
