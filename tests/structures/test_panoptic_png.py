import numpy as np
import pytest

from upsnet.structures.panoptic_png import MAX_SEGMENT_ID, id_to_rgb, rgb_to_id


def test_the_formula():
    rgb = np.array([[[1, 0, 0], [0, 1, 0], [0, 0, 1], [255, 255, 255], [7, 8, 9]]], dtype=np.uint8)
    assert rgb_to_id(rgb).tolist() == [[1, 256, 65536, MAX_SEGMENT_ID, 7 + 256 * 8 + 65536 * 9]]


def test_round_trip():
    ids = np.random.default_rng(0).integers(0, MAX_SEGMENT_ID + 1, (20, 30)).astype(np.int32)
    assert (rgb_to_id(id_to_rgb(ids)) == ids).all()


@pytest.mark.parametrize("bad", [-1, MAX_SEGMENT_ID + 1])
def test_ids_that_do_not_fit_are_refused(bad):
    with pytest.raises(ValueError, match=str(bad)):
        id_to_rgb(np.array([[0, bad]], dtype=np.int32))
