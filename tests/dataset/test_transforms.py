import cv2
import numpy as np
import pytest
import torch

from tests.fixtures import CONFIGURATIONS, load_units, piece
from tests.reference.labels import quarter_masks as slow_quarter_masks
from upsnet.dataset.batches import collate
from upsnet.dataset.transforms import (
    Transform,
    network_scale,
    normalize,
    padded_size,
    quarter_masks,
    resize_labels,
    resize_photo,
    scaled_size,
)
from upsnet.structures.errors import DataError
from upsnet.structures.masks import Bitmap, Masks, Polygons
from upsnet.structures.sample import Sample


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize(("short_side", "max_size"), [(160, 256), (100, 120)])
def test_network_input_of_the_original(shared, configuration, short_side, max_size):
    given, expected = piece(load_units(shared, configuration), "preprocess")
    photo = given["image_bgr"].numpy()[..., ::-1]
    transform = Transform((short_side,), max_size)
    scale = transform.scale(*photo.shape[:2], image_id=1)
    image = transform.image(photo, scale)
    name = f"{short_side}_{max_size}"
    assert scale == float(expected[f"scale_{name}"])
    assert list(image.shape[1:]) == expected[f"hw_{name}"].tolist() == list(scaled_size(*photo.shape[:2], scale))
    batch = collate([Sample(1, "a.jpg", image, photo.shape[:2], scale)])
    torch.testing.assert_close(batch.images, expected[f"blob_{name}"], rtol=1e-5, atol=1e-4)


def test_the_long_side_is_limited():
    assert network_scale(480, 640, 800, 1333) == 800 / 480
    assert network_scale(400, 1000, 800, 1333) == 1.333
    assert network_scale(1000, 400, 800, 1333) == 1.333
    # 800 / 480 * 800 = 1333.3 rounds to the limit, so it may stay.
    assert network_scale(480, 800, 800, 1333) == 800 / 480


def test_halves_round_to_even_as_opencv_does():
    for side in range(1, 40):
        resized = cv2.resize(np.zeros((side, 3), np.float32), None, fx=1, fy=0.5) if side > 1 else None
        assert resized is None or resized.shape[0] == scaled_size(side, 3, 0.5)[0]


def test_photos_are_sampled_in_steps_of_the_scale():
    """Not in steps of the ratio of the rounded sizes: 50 · 1.05 = 52.5 becomes 52 pixels."""
    scale, width = 1.05, 50
    ramp = np.broadcast_to(np.arange(width, dtype=np.float32)[None, :, None], (20, width, 3))
    row = resize_photo(np.ascontiguousarray(ramp), scale)[0, 10].numpy()
    positions = (np.arange(52) + 0.5) / scale - 0.5
    np.testing.assert_allclose(row, positions.clip(0, width - 1), atol=2e-3)


def test_a_photo_of_which_nothing_would_be_left_is_refused():
    with pytest.raises(DataError, match="image 8: 1×5000"):
        Transform((800,), 1333).scale(1, 5000, image_id=8)


def test_padding_to_multiples():
    assert padded_size((32, 33)) == (32, 64)
    assert padded_size((1, 800), 64) == (64, 832)


def test_the_drawn_scale_depends_on_seed_step_and_image_alone():
    transform = Transform((100, 120, 140, 160), 1000, seed=3)
    scales = [transform.scale(200, 300, image_id=5, step=step) for step in range(100)]
    assert scales == [transform.scale(200, 300, image_id=5, step=step) for step in range(100)]
    assert set(scales) == {0.5, 0.6, 0.7, 0.8}
    assert scales != [transform.scale(200, 300, image_id=6, step=step) for step in range(100)]
    assert scales != [transform.scale(200, 300, image_id=5, step=step, flipped=True) for step in range(100)]
    other = Transform((100, 120, 140, 160), 1000, seed=4)
    assert scales != [other.scale(200, 300, image_id=5, step=step) for step in range(100)]


def test_a_caffe_model_gets_bgr_and_a_torchvision_one_rgb():
    photo = np.array([[[255, 100, 0]]], dtype=np.uint8)
    np.testing.assert_allclose(normalize(photo, (1.0, 2.0, 3.0), True), [[[-1, 98, 252]]])
    unit = [(1 - 0.485) / 0.229, (100 / 255 - 0.456) / 0.224, (0 - 0.406) / 0.225]
    np.testing.assert_allclose(normalize(photo, (1.0, 2.0, 3.0), False), [[unit]], rtol=1e-5)


@pytest.mark.parametrize("use_caffe_model", [True, False])
def test_the_picture_of_an_input_is_the_photo(use_caffe_model):
    photo = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    transform = Transform((20,), 100, use_caffe_model=use_caffe_model)
    assert (transform.picture(transform.image(photo, 1.0)) == photo).all()


def test_labels_keep_their_values():
    labels = np.random.default_rng(0).integers(-1, 133, (31, 47)).astype(np.int16)
    resized = resize_labels(labels, 1.7)
    assert resized.dtype == np.int16 and resized.shape == scaled_size(31, 47, 1.7)
    assert set(np.unique(resized)) <= set(np.unique(labels))
    assert (resize_labels(labels, 1.0) == labels).all()


@pytest.mark.parametrize("scale", [0.31, 0.5, 0.999, 1.0, 1.0666667, 1.6, 2.5396825])
@pytest.mark.parametrize("size", [(37, 53), (64, 64), (5, 91)])
def test_quarter_masks_equal_their_slow_twin(scale, size):
    draws = np.random.default_rng(0)
    height, width = size
    whole = Bitmap.from_map(np.ones(size, dtype=bool))
    speckled = Bitmap.from_map(draws.random(size) < 0.4)
    pixel = Bitmap(width - 1, height - 1, np.ones((1, 1), dtype=bool))
    triangle = Polygons((np.array([-3.0, -2, width + 4.5, height / 2, 7.25, height + 9]),))
    masks = Masks([whole, speckled, pixel, triangle])
    scaled = scaled_size(height, width, scale)
    canvas = round(scaled[0] / scale), round(scaled[1] / scale)
    fast = quarter_masks(masks, scaled, scale)
    assert fast.shape == (4, round(scaled[0] / 4), round(scaled[1] / 4))
    assert (fast == slow_quarter_masks(masks, scaled, scale, canvas)).all()
    assert quarter_masks(Masks([]), scaled, scale).shape == (0, *fast.shape[1:])


def test_the_canvas_of_cityscapes_masks_is_the_photo_at_every_scale_of_the_recipes():
    """The original cuts fractions off where it rounds for COCO; here there are none, so both are the same."""
    for short_side in range(800, 1025, 32):
        scale = network_scale(1024, 2048, short_side, 2048)
        height, width = scaled_size(1024, 2048, scale)
        assert (height / scale, width / scale) == (1024, 2048)
