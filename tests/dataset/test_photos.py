import io

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.miniature import write_miniature
from upsnet.dataset.photos import read_photo, read_segment_map
from upsnet.structures.errors import DataError

HEIGHT, WIDTH = 40, 60


@pytest.fixture
def picture():
    """Red on the left, blue on the right, a green corner at the top left."""
    picture = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    picture[:, : WIDTH // 2, 0] = 250
    picture[:, WIDTH // 2 :, 2] = 250
    picture[:16, :16] = (0, 250, 0)
    return picture


def save(path, picture, mode="RGB", rotation=None, **options):
    exif = Image.Exif()
    if rotation:
        exif[0x0112] = rotation
    Image.fromarray(picture).convert(mode).save(path, exif=exif, **options)
    return path


def test_photos_are_rgb(tmp_path, picture):
    photo = read_photo(save(tmp_path / "a.jpg", picture, quality=95))
    assert photo.shape == (HEIGHT, WIDTH, 3) and photo.dtype == np.uint8
    assert np.abs(photo.astype(int) - picture)[20:, 4:26].max() < 12
    assert photo[30, 10, 0] > 230 and photo[30, 50, 2] > 230


def test_cmyk_grey_and_16_bit_photos(tmp_path, picture):
    cmyk = read_photo(save(tmp_path / "cmyk.jpg", picture, "CMYK", quality=95))
    assert np.abs(cmyk.astype(int) - picture)[20:, 4:26].max() < 20
    grey = read_photo(save(tmp_path / "grey.jpg", picture, "L", quality=95))
    assert grey.shape == (HEIGHT, WIDTH, 3) and (grey[..., 0] == grey[..., 2]).all()
    cv2.imwrite(str(tmp_path / "deep.png"), picture[..., ::-1].astype(np.uint16) * 257)
    assert (read_photo(tmp_path / "deep.png") == picture).all()


def test_transparent_and_palette_photos(tmp_path, picture):
    assert (read_photo(save(tmp_path / "a.png", picture, "RGBA")) == picture).all()
    assert read_photo(save(tmp_path / "p.png", picture, "P")).shape == (HEIGHT, WIDTH, 3)


def test_the_size_of_the_json_decides_about_rotation(tmp_path, picture):
    path = save(tmp_path / "turned.jpg", picture, rotation=6, quality=95)
    stored = read_photo(path, (HEIGHT, WIDTH))
    assert stored[4, 4, 1] > 230, "as stored: the green corner stays at the top left"
    turned = read_photo(path, (WIDTH, HEIGHT))
    assert turned[4, HEIGHT - 5, 1] > 230, "turned clockwise: the corner moves to the top right"
    with pytest.raises(DataError, match=r"turned\.jpg.*40×60.*41×60"):
        read_photo(path, (HEIGHT + 1, WIDTH))


def test_prediction_applies_exif(tmp_path, picture):
    path = save(tmp_path / "turned.jpg", picture, rotation=6, quality=95)
    assert read_photo(path, apply_exif=True).shape == (WIDTH, HEIGHT, 3)
    assert read_photo(path).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_jpeg_is_refused(tmp_path, picture, share, progressive):
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3)).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).save(data, "JPEG", progressive=progressive)
    path = tmp_path / "cut.jpg"
    path.write_bytes(data.getvalue()[: int(len(data.getvalue()) * share)])
    with pytest.raises(DataError, match=r"cut\.jpg"):
        read_photo(path)


def test_a_truncated_jpeg_with_a_whole_thumbnail_is_refused(tmp_path, picture):
    thumbnail = io.BytesIO()
    Image.fromarray(picture).save(thumbnail, "JPEG")
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "JPEG", comment=thumbnail.getvalue())
    path = tmp_path / "cut.jpg"
    path.write_bytes(data.getvalue())
    assert read_photo(path).shape == (HEIGHT, WIDTH, 3)
    path.write_bytes(data.getvalue()[:-30])
    with pytest.raises(DataError, match=r"cut\.jpg.*cut off"):
        read_photo(path)


def test_bytes_after_the_end_do_no_harm(tmp_path, picture):
    path = save(tmp_path / "long.jpg", picture)
    path.write_bytes(path.read_bytes() + b"\0" * 1000)
    assert read_photo(path).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture_is_refused(tmp_path, content):
    path = tmp_path / "odd.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"odd\.jpg"):
        read_photo(path)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(DataError, match=r"none\.jpg.*No such file"):
        read_photo(tmp_path / "none.jpg")
    with pytest.raises(DataError, match="cannot be read"):
        read_photo(tmp_path)


def test_segment_maps(tmp_path):
    folder = write_miniature(tmp_path)
    segment_map = read_segment_map(folder / "annotations/panoptic_train/000000000003.png", (48, 64))
    assert segment_map.dtype == np.int32
    assert set(np.unique(segment_map)) == {41, 257, 70000, 65536 * 3 + 5}


def test_a_grey_png_is_no_label(tmp_path, picture):
    for mode in ("L", "I;16"):
        path = tmp_path / "grey.png"
        cv2.imwrite(str(path), picture[..., 0].astype(np.uint8 if mode == "L" else np.uint16))
        with pytest.raises(DataError, match=r"grey\.png.*8-bit RGB PNG"):
            read_segment_map(path, (HEIGHT, WIDTH))
