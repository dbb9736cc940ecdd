"""The one file that decodes and encodes pictures: photos, panoptic PNGs, maps of semantic ids."""

import os
import re
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from upsnet.structures.errors import DataError
from upsnet.structures.panoptic_png import rgb_to_id
from upsnet.structures.places import replacing

_PNG, _END_OF_PNG = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
_GREY, _RGB, _PALETTE, _RGBA = 0, 2, 3, 6  # colour types of PNG
_JPEG, _END_OF_JPEG, _SCAN = b"\xff\xd8", 0xD9, 0xDA
_WITHOUT_LENGTH = (0x00, 0x01, *range(0xD0, 0xD9))
_MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""What ends the compressed data of a JPEG: in it FF00 is a byte FF, FFD0..FFD7 restart, FFs may precede a marker."""


class Readable(Protocol):
    """A file on disk, or inside another one; its text says where."""

    def read_bytes(self) -> bytes: ...


def read_photo(path: Readable, size: tuple[int, int] | None = None, apply_exif: bool = False) -> NDArray[np.uint8]:
    """A photo as H×W×3 uint8 RGB; grey-scale, CMYK and 16-bit files are converted.

    Args:
        size: the height and width that the annotations speak of. Without it, `apply_exif` decides about rotation;
            with it, the photo is taken as stored if that fits, else rotated as its EXIF record says if that fits.

    Raises:
        DataError: the file is missing, cut off, no picture, or has another size.
    """
    data = read_complete(path)
    photo = _decode_photo(path, data, apply_exif and size is None)
    if size is not None and photo.shape[:2] != size:
        stored = photo.shape[:2]
        photo = _decode_photo(path, data, True)
        if photo.shape[:2] != size:
            raise DataError(
                f"{path}: the photo has {stored[0]}×{stored[1]} pixels (height × width), the annotations say "
                f"{size[0]}×{size[1]}: photo and annotations do not belong together"
            )
    return photo


def read_segment_map(path: Readable, size: tuple[int, int] | None = None) -> NDArray[np.int32]:
    """The segment ids of a panoptic PNG, H×W int32.

    Args:
        size: the height and width that the annotations speak of, if they do.

    Raises:
        DataError: the file is missing, cut off, damaged, not an 8-bit colour PNG, or has another size.
    """
    data = read_complete(path)
    color, depth = _png_kind(data)
    if color != _PALETTE and not (color in (_RGB, _RGBA) and depth == 8):
        raise DataError(f"{path}: is not an 8-bit RGB PNG, which a panoptic label must be")
    picture = _decode(path, data, cv2.IMREAD_UNCHANGED)
    if size is not None and picture.shape[:2] != size:
        height, width = picture.shape[:2]
        raise DataError(
            f"{path}: the label has {height}×{width} pixels (height × width), the annotations say "
            f"{size[0]}×{size[1]}: label and annotations do not belong together"
        )
    return rgb_to_id(np.asarray(picture[..., 2::-1], dtype=np.uint8))


def read_grey_png(path: Path) -> NDArray[Any]:
    """A grey-scale PNG as H×W uint8 or uint16, whichever it holds.

    Raises:
        DataError: the file is missing, cut off, damaged, or not a grey-scale PNG of 8 or 16 bits.
    """
    data = read_complete(path)
    color, depth = _png_kind(data)
    if color != _GREY or depth not in (8, 16):
        raise DataError(f"{path}: is not a grey-scale PNG of 8 or 16 bits, which a map of semantic ids must be")
    return _decode(path, data, cv2.IMREAD_UNCHANGED)


def photo_size(path: Path) -> tuple[int, int]:
    """Height and width of a photo as stored, from its header; of most files only the two ends are read.

    Raises:
        DataError: the file is missing, cut off or no picture.
    """
    try:
        with open(path, "rb") as file, Image.open(file) as picture:
            width, height = picture.size
            file.seek(max(file.seek(0, os.SEEK_END) - 1024, 0))
            tail = file.read()
    except (UnidentifiedImageError, Image.DecompressionBombError):
        raise DataError(f"{path}: is damaged or not a picture: copy or download it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}): check the path") from None
    if bytes((0xFF, _END_OF_JPEG)) not in tail and _END_OF_PNG not in tail:
        read_complete(path)  # what follows the end may be long; then the end is looked for from the beginning
    return height, width


def png_size(path: Path) -> tuple[int, int]:
    """Height and width of a PNG, from its header; only the two ends of the file are read.

    Raises:
        DataError: the file is missing, cut off or no PNG.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(24)
            file.seek(max(file.seek(0, os.SEEK_END) - 1024, 0))
            tail = file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    if not head.startswith(_PNG) or _END_OF_PNG not in tail:
        raise DataError(f"{path}: the file is cut off or not a PNG: copy or download it again")
    return int.from_bytes(head[20:24], "big"), int.from_bytes(head[16:20], "big")


def write_png(path: Path, pixels: NDArray[Any]) -> None:
    """Writes a PNG, see `encode_png`, whole or not at all.

    Raises:
        PlaceError: the folder cannot be written or the disk is full.
    """
    with replacing(path) as part:
        part.write_bytes(encode_png(pixels))


def encode_png(pixels: NDArray[Any]) -> bytes:
    """H×W uint8 or uint16, or H×W×3 uint8 RGB, as PNG."""
    return _encode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])


def encode_jpeg(rgb: NDArray[np.uint8], quality: int) -> bytes:
    """H×W×3 uint8 RGB as JPEG. quality: 0..100."""
    return _encode(".jpg", rgb, [cv2.IMWRITE_JPEG_QUALITY, quality])


def _encode(ending: str, pixels: NDArray[Any], options: list[int]) -> bytes:
    stored = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if pixels.ndim == 3 else pixels
    done, data = cv2.imencode(ending, stored, options)
    assert done
    return data.tobytes()


def _decode_photo(path: Readable, data: bytes, apply_exif: bool) -> NDArray[np.uint8]:
    flags = cv2.IMREAD_COLOR if apply_exif else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    return np.asarray(cv2.cvtColor(_decode(path, data, flags), cv2.COLOR_BGR2RGB), dtype=np.uint8)


def _decode(path: Readable, data: bytes, flags: int) -> NDArray[Any]:
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:  # a damaged header promises more than 2^30 pixels
        picture = None
    if picture is None:
        raise DataError(f"{path}: is damaged or not a picture: copy or download it again")
    return picture


def read_complete(path: Readable) -> bytes:
    """The bytes of a picture file, refused if its end is missing: decoders fill the rest with grey.

    Raises:
        DataError: the file is missing or cut off.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    cut_jpeg = data.startswith(_JPEG) and not _has_end_of_jpeg(data)
    cut_png = data.startswith(_PNG) and _END_OF_PNG not in data
    if not data or cut_jpeg or cut_png:
        raise DataError(f"{path}: the file is cut off after {len(data)} bytes: copy or download it again")
    return data


def _has_end_of_jpeg(data: bytes) -> bool:
    """Whether the first picture of a JPEG file comes to its end (ITU-T T.81, annex B).

    Thumbnails lie inside segments, which are skipped by their length. What follows the end is of no interest: phones
    put films and further pictures there.
    """
    position = data.find(b"\xff", len(_JPEG))
    while 0 <= position < len(data) - 1:
        marker = data[position + 1]
        if marker == _END_OF_JPEG:
            return True
        if marker == 0xFF:
            position += 1
            continue
        position += 2
        if marker not in _WITHOUT_LENGTH:
            position += int.from_bytes(data[position : position + 2], "big")
        if marker == _SCAN:
            found = _MARKER_IN_SCAN.search(data, position)
            position = found.start() if found else -1
        else:
            position = data.find(b"\xff", position)
    return False


def _png_kind(data: bytes) -> tuple[int, int]:
    """Colour type and bits of each channel as the header of a PNG says; (-1, -1) for another file."""
    return (data[25], data[24]) if data.startswith(_PNG) and len(data) > 25 else (-1, -1)
