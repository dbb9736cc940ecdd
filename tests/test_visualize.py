"""Pictures: what is visible where, not how pretty it is."""

import colorsys
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from upsnet.structures.categories import Categories, Category
from upsnet.structures.masks import Bitmap, Masks, Polygons
from upsnet.structures.panoptic_png import rgb_to_id
from upsnet.structures.results import Segment, segments_of
from upsnet.structures.sample import VOID, Batch, Instances
from upsnet.visualize import _largest_room, draw_batch, draw_panoptic, enlargement, segment_colors, shade

GRASS, SKY, BALL, KITE = 0, 1, 2, 3
CATEGORIES = Categories(
    [
        Category(7, "grass", False, (40, 180, 60)),
        Category(9, "sky", False, (120, 190, 250)),
        Category(1, "ball", True, (220, 20, 60)),
        Category(4, "kite", True, (250, 210, 30)),
    ]
)


def gray(height, width):
    return np.full((height, width, 3), 128, dtype=np.uint8)


def scene(height=480, width=640):
    """Sky (id 5) over grass (id 70000), two balls (256, 257) in the middle row."""
    segment_map = np.full((height, width), 5, dtype=np.int32)
    segment_map[height // 2 :] = 70000
    for segment_id, x in ((256, width // 8), (257, 5 * width // 8)):
        segment_map[height // 4 : 3 * height // 4, x : x + width // 4] = segment_id
    segments = segments_of(segment_map, {5: SKY, 70000: GRASS, 256: BALL, 257: BALL}, {256: 0.87, 257: 0.55})
    return segment_map, segments


def hue(color):
    return colorsys.rgb_to_hsv(*(value / 255 for value in color))[0]


def hue_distance(a, b):
    return abs((hue(a) - hue(b) + 0.5) % 1 - 0.5)


@pytest.mark.parametrize(
    ("size", "drawn"),
    [
        ((1, 1), (640, 640)),
        ((12, 16), (480, 640)),
        ((120, 160), (480, 640)),
        ((300, 400), (600, 800)),
        ((480, 640), (480, 640)),
        ((40, 3000), (40, 3000)),
    ],
)
def test_small_photos_are_drawn_larger_by_a_whole_factor(size, drawn):
    segment_map = np.ones(size, dtype=np.int32)
    picture = draw_panoptic(gray(*size), segment_map, segments_of(segment_map, {1: SKY}), CATEGORIES)
    assert picture.shape == (*drawn, 3)
    assert picture.dtype == np.uint8
    assert enlargement(*size) * size[0] == drawn[0]


def test_photo_and_map_stay_as_they_were():
    segment_map, segments = scene()
    photo = gray(480, 640)
    copies = photo.copy(), segment_map.copy()
    draw_panoptic(photo, segment_map, segments, CATEGORIES)
    np.testing.assert_array_equal(photo, copies[0])
    np.testing.assert_array_equal(segment_map, copies[1])


def test_stuff_has_its_class_color_and_alpha_mixes_it_with_the_photo():
    segment_map, segments = scene()
    for alpha in (0.0, 0.5, 1.0):
        picture = draw_panoptic(gray(480, 640), segment_map, segments, CATEGORIES, alpha=alpha, names=False)
        wanted = (1 - alpha) * 128 + alpha * np.array(CATEGORIES[SKY].color)
        np.testing.assert_allclose(picture[10, 10].astype(float), wanted, atol=1)


def test_colors_depend_on_class_and_order_only():
    segments = [Segment(i, BALL, 1, (0, 0, 1, 1)) for i in (3, 8, 900)]
    colors = segment_colors(segments, CATEGORIES)
    assert colors == segment_colors([replace(s, area=55, score=0.3) for s in segments[::-1]], CATEGORIES)
    assert colors[3] == CATEGORIES[BALL].color
    assert len(set(colors.values())) == 3
    with_kite = segment_colors([Segment(1, KITE, 1, (0, 0, 1, 1)), *segments], CATEGORIES)
    assert {i: with_kite[i] for i in colors} == colors


@pytest.mark.parametrize("color", [(220, 20, 60), (250, 210, 30), (0, 0, 142), (10, 200, 10)])
def test_shades_stay_near_the_hue_and_differ(color):
    shades = [shade(color, number) for number in range(8)]
    assert len(set(shades)) == 8
    assert all(hue_distance(color, other) < 0.07 for other in shades)


@pytest.mark.parametrize("color", [(0, 0, 0), (255, 255, 255), (128, 128, 128)])
def test_shades_of_gray_are_colors(color):
    shades = [shade(color, number) for number in range(20)]
    assert all(0 <= value <= 255 for other in shades for value in other)
    assert len(set(shades)) > 3


def test_things_have_white_outlines_and_stuff_dark_ones():
    segment_map, segments = scene()
    picture = draw_panoptic(gray(480, 640), segment_map, segments, CATEGORIES, names=False)
    ball_edge = picture[300, 76:84]
    assert (ball_edge == 255).all(axis=1).any()
    assert (ball_edge.max(axis=1) < 70).any()
    stuff_edge = picture[236:244, 10]
    assert (stuff_edge.max(axis=1) < 70).any()
    assert not (stuff_edge == 255).all(axis=1).any()


def test_lines_grow_with_the_photo():
    def white(height, width):
        segment_map, segments = scene(height, width)
        picture = draw_panoptic(gray(height, width), segment_map, segments, CATEGORIES, names=False)
        return int((picture[5 * height // 8] == 255).all(axis=1).sum())

    assert white(480, 640) >= 4
    assert white(2000, 3000) >= 4 * white(480, 640)


def test_void_is_dark_gray_and_so_are_ids_without_segment():
    segment_map, segments = scene()
    segment_map[:100] = 0
    segment_map[380:] = 9
    photo = gray(480, 640)
    photo[..., 0] = 250
    picture = draw_panoptic(photo, segment_map, segments, CATEGORIES, names=False)
    for part in (picture[10:80], picture[400:470]):
        assert (part == part[..., :1]).all()
        assert part.max() < 128
        assert part.min() < part.max()


@pytest.mark.parametrize("size", [(120, 160), (480, 640), (1500, 2200), (900, 200)])
def test_names_lie_inside_their_segments(size):
    segment_map, segments = scene(*size)
    without = draw_panoptic(gray(*size), segment_map, segments, CATEGORIES, names=False)
    picture = draw_panoptic(gray(*size), segment_map, segments, CATEGORIES)
    factor = enlargement(*size)
    large = segment_map.repeat(factor, 0).repeat(factor, 1)
    written = (picture != without).any(axis=-1)
    assert set(np.unique(large[written])) == {5, 70000, 256, 257}
    for segment_id in (256, 257):
        rows, columns = np.nonzero(written & (large == segment_id))
        inside = large[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        if size != (900, 200):
            assert (inside == segment_id).all()
        letters = (picture > 200).all(axis=-1) & written & (large == segment_id)
        assert letters.sum() > 30
    assert np.ptp(np.nonzero(written & (large == 256))[0]) >= 11


def test_of_two_names_without_room_the_larger_segment_gets_its_name():
    segment_map = np.full((480, 640), 1, dtype=np.int32)
    segment_map[200:230, 300:320] = 2
    segment_map[200:228, 321:341] = 3
    segments = segments_of(segment_map, {1: GRASS, 2: BALL, 3: KITE})

    def changed(shown):
        with_names = draw_panoptic(gray(480, 640), segment_map, shown, CATEGORIES)
        return (with_names != draw_panoptic(gray(480, 640), segment_map, shown, CATEGORIES, names=False)).any(axis=-1)

    both = changed(segments)
    assert both[205:225, 305:315].any()
    # Alone the kite is named; beside the ball its name would cover the ball's and is left out.
    kite_alone = changed([s for s in segments if s.id != 2])
    assert kite_alone[205:225, 335:341].any()
    assert not both[205:225, 335:341].any()


def test_no_segments_and_empty_maps():
    blank = draw_panoptic(gray(480, 640), np.zeros((480, 640), np.int32), [], CATEGORIES)
    assert blank.max() < 128
    assert draw_panoptic(gray(480, 640)[:0], np.zeros((0, 640), np.int32), [], CATEGORIES).shape[0] == 0


def test_more_than_255_segments_are_all_visible():
    tiles = np.arange(24 * 30).reshape(24, 30) + 1
    segment_map = tiles.repeat(20, 0).repeat(21, 1).astype(np.int32)
    segments = segments_of(segment_map, {i: BALL if i % 2 else SKY for i in range(1, 721)})
    picture = draw_panoptic(gray(*segment_map.shape), segment_map, segments, CATEGORIES, alpha=1.0, names=False)
    colors = segment_colors(segments, CATEGORIES)
    middles = picture[10::20, 10::21].reshape(-1, 3)
    assert [tuple(c) for c in middles.tolist()] == [colors[i] for i in range(1, 721)]


def test_one_pixel_segment_is_visible():
    segment_map, _ = scene()
    segment_map[100, 100] = 33
    segments = segments_of(segment_map, {5: SKY, 70000: GRASS, 256: BALL, 257: BALL, 33: KITE})
    picture = draw_panoptic(gray(480, 640), segment_map, segments, CATEGORIES, names=False)
    assert (picture[98:103, 98:103] == 255).all(axis=-1).any()


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(480, 640\).*\(4, 6\)"):
        draw_panoptic(gray(480, 640), np.zeros((4, 6), np.int32), [], CATEGORIES)


@pytest.mark.parametrize("seed", range(20))
def test_largest_room_against_all_boxes(seed):
    """With aspect 1 the room is the largest odd square inside the mask; slow twin: try them all."""
    draws = np.random.default_rng(seed)
    mask = draws.random((13, 17)) < draws.uniform(0.5, 1.0)
    best = 0
    for y in range(13):
        for x in range(17):
            for radius in range(7):
                top, left = y - radius, x - radius
                square = mask[max(top, 0) : y + radius + 1, max(left, 0) : x + radius + 1]
                whole = top >= 0 and left >= 0 and square.shape == (2 * radius + 1, 2 * radius + 1)
                if whole and square.all():
                    best = max(best, 2 * radius + 1)
    room = _largest_room(mask, 1.0, 1000.0)
    assert room.height == best
    if best:
        radius, y, x = best // 2, int(room.y), int(room.x)
        # A place nearly as roomy as the best may be taken if it is more central.
        radius = int(0.6 * (radius + 1)) - 1 if radius else 0
        assert mask[y - max(radius, 0) : y + max(radius, 0) + 1, x - max(radius, 0) : x + max(radius, 0) + 1].all()


def test_real_photos(shared):
    root = shared("data/coco_mini")
    content = json.loads((root / "annotations/panoptic_val2017.json").read_text())
    categories = Categories.from_coco(content["categories"], "coco_mini")
    names = {image["id"]: image["file_name"] for image in content["images"]}
    for record in content["annotations"][:5]:
        photo = np.asarray(Image.open(root / "images/val2017" / names[record["image_id"]]).convert("RGB"))
        png = Image.open(root / "annotations/panoptic_val2017" / record["file_name"])
        segment_map = rgb_to_id(np.asarray(png.convert("RGB")))
        ids = {s["id"]: categories.semantic_id(s["category_id"]) for s in record["segments_info"]}
        segments = segments_of(segment_map, ids)
        picture = draw_panoptic(photo, segment_map, segments, categories, names=False)
        assert picture.shape == photo.shape
        for segment in segments:
            inside = segment_map == segment.id
            assert (picture[inside] != photo[inside]).any()


def batch_of_two():
    """A 40×60 image with a ball, a crowd and void, and one of 64×32 without things, padded to 64×64."""
    images = torch.zeros(2, 3, 64, 64)
    images[0, :, :40, :60] = 30.0
    images[1, :, :64, :32] = -30.0
    semantic = torch.full((2, 64, 64), VOID, dtype=torch.int16)
    semantic[0, :40, :60] = SKY
    semantic[0, 10:30, 10:30] = BALL
    semantic[0, :40, 50:60] = VOID
    semantic[1, :64, :32] = GRASS
    ball = np.zeros((80, 120), dtype=bool)
    ball[20:60, 20:60] = True
    masks = Masks([Polygons((np.array([100.0, 0, 119, 0, 119, 20]),)), Bitmap.from_map(ball)])
    boxes = torch.tensor([[100.0, 0, 119, 20], [20, 20, 59, 59]])
    some = Instances(boxes, torch.tensor([2, 1]), torch.tensor([True, False]), masks)
    none = Instances(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool), Masks([]))
    quarter = torch.zeros(1, 10, 15, dtype=torch.bool)
    quarter[0, 2:8, 2:8] = True
    return Batch(
        images=images,
        sizes=[(40, 60), (64, 32)],
        image_ids=[11, 12],
        file_names=["a.jpg", "b.jpg"],
        original_sizes=[(80, 120), (64, 32)],
        scales=[0.5, 1.0],
        flipped=[False, True],
        instances=[some, none],
        semantic=semantic,
        quarter_masks=[quarter, torch.zeros(0, 16, 8, dtype=torch.bool)],
    )


def to_photo(image):
    return (image + 128).byte().permute(1, 2, 0).contiguous().numpy()


def panels_of(picture):
    """Image 0: things panel and semantic panel, below the caption strip."""
    factor = enlargement(64, 64)
    caption = picture.shape[0] // 2 - 64 * factor
    first = picture[caption : caption + 64 * factor]
    return first[:, : 64 * factor], first[:, 64 * factor :], factor


def test_first_batch_shows_boxes_masks_stuff_and_padding():
    picture = draw_batch(batch_of_two(), CATEGORIES, to_photo)
    things, semantic, k = panels_of(picture)
    assert picture.shape[1] == 2 * 64 * k
    photo = np.array([158, 158, 158])
    ball = np.array(CATEGORIES[BALL].color)
    np.testing.assert_allclose(things[20 * k, 20 * k], photo // 2 + ball // 2, atol=2)
    np.testing.assert_array_equal(things[35 * k, 5 * k], photo)
    # The box (20..59 in the photo, scale 0.5) in the class colour; the crowd's box is grey.
    near_left_edge = things[12 * k : 28 * k, 9 * k : 11 * k]
    assert (near_left_edge == ball).all(axis=-1).any()
    assert (things[: 10 * k, 59 * k : 60 * k] == 170).all(axis=-1).any()
    np.testing.assert_allclose(semantic[35 * k, 5 * k], photo // 2 + np.array(CATEGORIES[SKY].color) // 2, atol=2)
    assert semantic[5 * k : 35 * k, 52 * k : 58 * k].max() < 150
    for panel in (things, semantic):
        padding = panel[42 * k :]
        assert padding.max() < 128
        assert (padding == padding[..., :1]).all()


def test_first_batch_takes_instance_masks_where_there_are_no_quarter_masks():
    batch = replace(batch_of_two(), quarter_masks=None)
    things, _, k = panels_of(draw_batch(batch, CATEGORIES, to_photo))
    np.testing.assert_allclose(things[20 * k, 20 * k], 79 + np.array(CATEGORIES[BALL].color) // 2, atol=2)


def test_first_batch_without_parts_and_with_a_limit():
    bare = replace(batch_of_two(), instances=None, semantic=None, quarter_masks=None)
    picture = draw_batch(bare, CATEGORIES, to_photo)
    assert picture.shape[1] == 64 * enlargement(64, 64)
    one = draw_batch(bare, CATEGORIES, to_photo, max_images=1)
    assert 2 * one.shape[0] == picture.shape[0]
