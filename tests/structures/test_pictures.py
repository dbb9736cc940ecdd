import io
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.miniature import write_miniature
from upsnet.structures.errors import DataError, PlaceError
from upsnet.structures.pictures import png_size, read_grey_png, read_photo, read_segment_map, write_png

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


def test_a_truncated_jpeg_with_a_whole_thumbnail_in_exif_is_refused(tmp_path, picture):
    thumbnail = io.BytesIO()
    Image.fromarray(picture).save(thumbnail, "JPEG")
    exif = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + thumbnail.getvalue()
    path = tmp_path / "cut.jpg"
    Image.fromarray(picture).save(path, "JPEG", exif=exif)
    whole = path.read_bytes()
    assert whole.count(thumbnail.getvalue()[-30:]) == 2 and read_photo(path).shape == (HEIGHT, WIDTH, 3)
    # inside the thumbnail, behind it, in the scan, and before the second byte of the end marker
    for length in (100, whole.index(b"\xff\xd9") + 2, len(whole) - 30, len(whole) - 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.jpg.*cut off"):
            read_photo(path)


SCAN = b"\xff\xda"
SEVERAL = np.random.default_rng(1).integers(0, 256, 5000, dtype=np.uint8).tobytes()


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("trailer", [b"\0" * 1000, SCAN, SEVERAL + SCAN + SEVERAL, b"\xff\xd8\xff\xe0" + SEVERAL])
def test_bytes_after_the_end_do_no_harm(tmp_path, picture, trailer, progressive):
    """Phones put films there (motion photos), cameras further pictures."""
    path = save(tmp_path / "long.jpg", picture, progressive=progressive)
    assert (path.read_bytes().count(SCAN) > 1) == progressive
    alone = read_photo(path)
    path.write_bytes(path.read_bytes() + trailer)
    assert (read_photo(path) == alone).all()


@pytest.mark.parametrize("options", [{"restart_marker_blocks": 1}, {"quality": 100}, {"optimize": True}])
def test_jpegs_with_much_between_their_markers(tmp_path, options):
    noise = np.random.default_rng(0).integers(0, 255, (64, 80, 3)).astype(np.uint8)
    path = save(tmp_path / "noise.jpg", noise, **options)
    assert read_photo(path).shape == (64, 80, 3)
    path.write_bytes(path.read_bytes().replace(b"\xff\xd9", b"\xff\xff\xff\xd9"))
    assert read_photo(path).shape == (64, 80, 3)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture_is_refused(tmp_path, content):
    path = tmp_path / "odd.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"odd\.jpg"):
        read_photo(path)


def test_a_header_that_promises_too_much(tmp_path, picture):
    data = save(tmp_path / "huge.png", picture).read_bytes()
    header = b"IHDR" + (10**6).to_bytes(4, "big") * 2 + data[24:29]
    (tmp_path / "huge.png").write_bytes(data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:])
    with pytest.raises(DataError, match=r"huge\.png.*damaged"):
        read_photo(tmp_path / "huge.png")


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
    for kind in (np.uint8, np.uint16):
        path = tmp_path / "grey.png"
        write_png(path, picture[..., 0].astype(kind))
        with pytest.raises(DataError, match=r"grey\.png.*8-bit RGB PNG"):
            read_segment_map(path, (HEIGHT, WIDTH))


@pytest.mark.parametrize("reader", [read_segment_map, read_grey_png])
def test_what_is_no_map(tmp_path, picture, reader):
    deep = tmp_path / "deep.png"
    cv2.imwrite(str(deep), picture.astype(np.uint16))
    (tmp_path / "text.png").write_text("x")
    kinds = [
        deep,
        save(tmp_path / "photo.jpg", picture),
        tmp_path / "text.png",
        save(tmp_path / "la.png", picture, "LA"),
    ]
    for path in kinds:
        with pytest.raises(DataError, match=rf"{path.name}: is not an? .* PNG"):
            reader(path)
    with pytest.raises(DataError, match=r"none\.png.*No such file"):
        reader(tmp_path / "none.png")
    path = tmp_path / "map.png"
    write_png(path, picture if reader is read_segment_map else picture[..., 0])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"map\.png.*cut off"):
        reader(path)
    path.write_bytes(whole[:60] + bytes([whole[60] ^ 85]) + whole[61:])
    with pytest.raises(DataError, match=r"map\.png.*damaged"):
        reader(path)


def test_label_of_another_size(tmp_path, picture):
    write_png(tmp_path / "label.png", picture)
    assert read_segment_map(tmp_path / "label.png").shape == (HEIGHT, WIDTH)
    with pytest.raises(DataError, match=r"label\.png.*40×60.*60×40"):
        read_segment_map(tmp_path / "label.png", (WIDTH, HEIGHT))


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_other_colour_pngs_are_labels_too(tmp_path, picture, mode):
    path = save(tmp_path / "label.png", picture, mode)
    write_png(tmp_path / "plain.png", np.asarray(Image.open(path).convert("RGB")))
    assert (read_segment_map(path) == read_segment_map(tmp_path / "plain.png")).all()


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_grey_pngs_come_back(tmp_path, kind):
    pixels = np.random.default_rng(0).integers(0, np.iinfo(kind).max + 1, (7, 9)).astype(kind)
    write_png(tmp_path / "new" / "ids.png", pixels)
    again = read_grey_png(tmp_path / "new" / "ids.png")
    assert again.dtype == kind and (again == pixels).all()


def test_colour_pngs_come_back(tmp_path, picture):
    write_png(tmp_path / "a.png", picture)
    assert (read_photo(tmp_path / "a.png") == picture).all()


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, picture):
    (tmp_path / "a.png").write_text("old")
    (tmp_path / "a.png.part").symlink_to("/dev/full")
    with pytest.raises(PlaceError, match=r"a\.png: No space left on device"):
        write_png(tmp_path / "a.png", picture)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"] and (tmp_path / "a.png").read_text() == "old"


def test_the_size_of_a_png_from_its_ends(tmp_path, picture):
    path = save(tmp_path / "a.png", picture)
    assert png_size(path) == (HEIGHT, WIDTH)
    data = path.read_bytes()
    for broken in (b"", data[:20], data[:-9], data[1:], b"x" * 5000):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"a\.png.*cut off or not a PNG"):
            png_size(path)
    with pytest.raises(DataError, match=r"b\.png.*cannot be read"):
        png_size(tmp_path / "b.png")
