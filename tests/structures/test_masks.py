import numpy as np
import pytest
from pycocotools import mask as coco_mask

from tests.reference.labels import crop_bitmap, polygon_area_by_points
from upsnet.structures.masks import Bitmap, Masks, Polygons, mask_from_coco

HEIGHT, WIDTH = 37, 53


def random_map(seed):
    draws = np.random.default_rng(seed)
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    for _ in range(3):
        y, x = draws.integers(0, HEIGHT - 4), draws.integers(0, WIDTH - 4)
        mask[y : y + draws.integers(1, 20), x : x + draws.integers(1, 20)] ^= True
    return mask


def random_polygon(seed, low=2.0, high=30.0):
    """A star-shaped polygon."""
    draws = np.random.default_rng(seed)
    angles = np.sort(draws.uniform(0, 2 * np.pi, 9))
    radius = draws.uniform(4, 14, 9)
    middle = (low + high) / 2
    return np.stack([middle + radius * np.cos(angles), middle + radius * np.sin(angles)], axis=1).ravel()


@pytest.mark.parametrize("seed", range(6))
def test_a_bitmap_keeps_its_pixels(seed):
    mask = random_map(seed)
    bitmap = Bitmap.from_map(mask)
    assert (bitmap.draw(HEIGHT, WIDTH) == mask).all()
    assert (bitmap.flip(WIDTH).draw(HEIGHT, WIDTH) == mask[:, ::-1]).all()
    rows, columns = np.nonzero(mask)
    assert bitmap.bounds() == (columns.min(), rows.min(), columns.max(), rows.max())


@pytest.mark.parametrize(
    "box",
    [
        (3.0, 4.0, 40.0, 30.0),
        (-10.0, -5.0, 20.5, 12.25),  # beyond the left and top edge
        (30.0, 20.0, 200.0, 100.0),  # beyond the right and bottom edge
        (10.0, 10.0, 10.0, 10.0),  # one pixel
        (12.7, 9.1, 12.9, 9.3),  # less than a pixel
        (500.0, 500.0, 600.0, 600.0),  # nowhere near
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_bitmap_crops_equal_their_slow_twin(seed, box):
    mask = random_map(seed)
    fast = Bitmap.from_map(mask).crop(np.array(box), 14)
    assert (fast == crop_bitmap(mask, box, 14)).all()


def test_an_empty_bitmap_is_harmless():
    empty = Bitmap.from_map(np.zeros((5, 6), dtype=bool))
    assert not empty.draw(5, 6).any()
    assert not empty.crop(np.array([0.0, 0.0, 4.0, 4.0]), 7).any()
    assert not empty.flip(6).draw(5, 6).any()


def test_a_bitmap_is_cut_off_at_the_edge_of_a_smaller_canvas():
    mask = np.ones((5, 6), dtype=bool)
    assert Bitmap.from_map(mask).draw(4, 5).shape == (4, 5)
    assert Bitmap(5, 4, np.ones((1, 1), dtype=bool)).draw(4, 5).sum() == 0


@pytest.mark.parametrize("seed", range(4))
def test_polygon_crops_cover_what_lies_inside(seed):
    polygon = random_polygon(seed)
    box = np.array([4.0, 5.0, 27.0, 29.0])
    size = 20
    moved = (polygon.reshape(-1, 2) - box[:2]) * (size / (box[2:] - box[:2]))
    share = polygon_area_by_points(moved, size)
    seen = Polygons((polygon,)).crop(box, size)
    assert seen[share == 1].mean() > 0.97
    assert seen[share == 0].mean() < 0.03


def test_polygon_crop_is_a_union():
    first, second = np.array([0.0, 0, 10, 0, 10, 10, 0, 10]), np.array([5.0, 5, 20, 5, 20, 20, 5, 20])
    box = np.array([0.0, 0.0, 20.0, 20.0])
    both = Polygons((first, second)).crop(box, 20)
    apart = Polygons((first,)).crop(box, 20) | Polygons((second,)).crop(box, 20)
    assert (both == apart).all() and both[2, 2] and both[15, 15] and not both[2, 15]


def test_polygon_crops_are_computed_in_single_precision():
    """As the original does; a box at fractions of a pixel, for which double precision fills other cells."""
    polygon, box = np.array([9.0, 20, 16, 22, 41, 39]), np.array([12.2, 11, 58.2, 51], dtype=np.float32)
    crops = []
    for kind in (np.float32, np.float64):
        x1, y1, x2, y2 = (kind(side) for side in box)
        moved = [
            float((kind(v) - start) * kind(28) / (end - start))
            for v, start, end in zip(polygon, [x1, y1] * 3, [x2, y2] * 3, strict=True)
        ]
        crops.append(coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([moved], 28, 28))).astype(bool))
    assert (Polygons((polygon,)).crop(box, 28) == crops[0]).all() and (crops[0] != crops[1]).sum() == 2


def test_a_box_of_no_width_does_not_divide_by_zero():
    square = Polygons((np.array([0.0, 0, 8, 0, 8, 8, 0, 8]),))
    assert square.crop(np.array([3.0, 3.0, 3.0, 3.0]), 4).all()


def test_flipping_twice_gives_the_same_polygons():
    polygon = random_polygon(1)
    once = Polygons((polygon,)).flip(WIDTH)
    assert np.allclose(once.flip(WIDTH).polygons[0], polygon)
    assert np.allclose(once.polygons[0][0::2], WIDTH - polygon[0::2] - 1)


def test_drawing_a_square_with_its_outline():
    drawn = Polygons((np.array([2.0, 3, 6, 3, 6, 8, 2, 8]),)).draw(12, 10)
    expected = np.zeros((12, 10), dtype=bool)
    expected[3:9, 2:7] = True
    assert (drawn == expected).all()


@pytest.mark.parametrize("compressed", [True, False])
def test_rle_becomes_a_bitmap(compressed):
    mask = random_map(3)
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    if not compressed:
        flat = mask.ravel(order="F").astype(int)
        edges = np.flatnonzero(np.diff(flat)) + 1
        counts = np.diff([0, *edges, len(flat)]).tolist()
        rle = {"size": [HEIGHT, WIDTH], "counts": [0, *counts] if flat[0] else counts}
    assert (mask_from_coco(rle, HEIGHT, WIDTH).draw(HEIGHT, WIDTH) == mask).all()


def test_segmentations_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="three corners"):
        mask_from_coco([[1, 2, 3, 4]], 5, 5)
    with pytest.raises(ValueError, match="size"):
        mask_from_coco({"size": [4, 5], "counts": "x"}, 5, 5)


def test_lists_of_masks():
    maps = [random_map(seed) for seed in range(3)]
    masks = Masks([Bitmap.from_map(mask) for mask in maps])
    assert (masks.draw(HEIGHT, WIDTH) == np.stack(maps)).all()
    assert (masks.select([2, 0]).draw(HEIGHT, WIDTH) == np.stack([maps[2], maps[0]])).all()
    assert masks.bounds().shape == (3, 4) and Masks([]).bounds().shape == (0, 4)
    assert masks.crop(np.zeros((3, 4)), 28).shape == (3, 28, 28) and Masks([]).crop(np.zeros((0, 4)), 28).shape[0] == 0
    with pytest.raises(ValueError, match="as many boxes"):
        masks.crop(np.zeros((2, 4)), 28)
