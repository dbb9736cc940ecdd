"""Photos in several views: what is in them, and how they travel together."""

import numpy as np
import pytest
import torch

from tests.miniature import write_miniature
from upsnet.dataset.batches import SamePaddedSizeSampler, collate
from upsnet.dataset.coco_panoptic import CocoPanoptic
from upsnet.dataset.image_sets import coco_image_sets
from upsnet.dataset.loading import BatchLoader
from upsnet.dataset.transforms import Transform
from upsnet.dataset.views import PhotoViews, Views
from upsnet.structures.errors import DataError


def views_of(*short_sides, flip=False, max_size=200):
    return Views([Transform((side,), max_size) for side in short_sides], flip)


def photos_in(folder, **options):
    write_miniature(folder, images=6)
    return CocoPanoptic(coco_image_sets(folder, "train"), Transform((48,), 200), targets=False, **options)


def test_one_view_is_the_sample_of_the_data_set(tmp_path):
    photos = photos_in(tmp_path)
    viewed = PhotoViews(photos, views_of(48))
    assert len(viewed) == len(photos)
    for i in range(len(photos)):
        ours, theirs = viewed[i], photos[i]
        assert torch.equal(ours.image, theirs.image) and len(ours.views) == 0 and ours.targets is None
        for name in ("image_id", "file_name", "original_size", "scale", "flipped", "size"):
            assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize("flip", [False, True])
def test_scale_after_scale_as_it_is_then_mirrored(flip):
    photo = np.random.default_rng(0).integers(0, 256, (48, 65, 3)).astype(np.uint8)
    views = views_of(60, 30, 90, flip=flip, max_size=100)
    sample = views.sample(photo, 3, "a.jpg")
    samples = [sample, *sample.views]
    assert len(samples) == views.count == (6 if flip else 3)
    mirrored = [False, True] if flip else [False]
    assert [each.flipped for each in samples] == mirrored * 3
    sizes = [(60, 81), (30, 41), (74, 100)]  # the last one is bounded by its long side
    assert [each.size for each in samples] == [size for size in sizes for _ in mirrored]
    assert {(each.image_id, each.file_name, each.original_size) for each in samples} == {(3, "a.jpg", (48, 65))}
    assert views.padded_sizes(48, 65) == ((64, 96), (32, 64), (96, 128))
    if flip:
        for plain, mirrored, transform in zip(samples[::2], samples[1::2], views.transforms, strict=True):
            assert torch.equal(mirrored.image, Views([transform]).sample(photo[:, ::-1]).image)
            assert torch.equal(plain.image, Views([transform]).sample(photo).image)


def test_scales_that_the_longest_side_makes_the_same_are_seen_once():
    views = views_of(60, 75, 90, flip=True, max_size=100)
    # 47×77: 60 → 98.3 fits, the others are bounded by 100. 50×83: 60 → 99.6 and 100 are one size, but not one scale.
    for size, expected in {
        (47, 77): [(60, 98), (61, 100)],
        (48, 80): [(60, 100)],
        (50, 83): [(60, 100)],
        (96, 161): [(60, 100)],
        (50, 50): [(60, 60), (75, 75), (90, 90)],
    }.items():
        sample = views.sample(np.zeros((*size, 3), np.uint8))
        assert [each.size for each in (sample, *sample.views)] == [seen for seen in expected for _ in range(2)]
        assert sample.scale == views.transforms[0].scale(*size, 0), "the first scale is the reference"
        assert len(views.padded_sizes(*size)) == len(expected)
    assert len({views.padded_sizes(*size) for size in ((47, 77), (48, 80))}) == 2, "they do not meet in a batch"


def test_photos_that_differ_in_any_view_do_not_meet(tmp_path):
    views = views_of(40, 64, flip=True)
    sizes = [views.padded_sizes(height, width) for height, width in ((40, 50), (40, 61), (40, 64), (40, 52), (80, 100))]
    assert {size[0] for size in sizes} == {(64, 64)} and {size[1] for size in sizes} == {(64, 96), (64, 128)}
    assert list(SamePaddedSizeSampler(sizes, 4)) == [[0, 3, 4], [1, 2]]
    photos = PhotoViews(photos_in(tmp_path), views)
    loader = BatchLoader(photos, SamePaddedSizeSampler(photos.padded_sizes(), 3), num_workers=1)
    seen = 0
    for batch in loader:
        assert len(batch.views) == 3 and not any(batch.flipped)
        assert not any(view.views for view in batch.views)
        for view in [batch, *batch.views]:
            assert view.image_ids == batch.image_ids and view.original_sizes == batch.original_sizes
            assert len(set(view.flipped)) == 1
            for size in view.sizes:
                assert [-(-side // 32) * 32 for side in size] == list(view.images.shape[-2:])
        seen += len(batch)
        moved = batch.to(torch.device("meta"))
        assert all(view.images.is_meta for view in [moved, *moved.views]) and not batch.views[0].images.is_meta
    assert seen == 6


def test_samples_with_different_numbers_of_views_are_a_bug():
    photo = np.zeros((40, 50, 3), np.uint8)
    with pytest.raises(ValueError):
        collate([views_of(40).sample(photo), views_of(40, 50).sample(photo)])


def test_a_photo_that_is_too_thin_at_one_scale():
    photo = np.zeros((2, 500, 3), np.uint8)
    views = views_of(40, 20, max_size=100)
    for call in (lambda: views.sample(photo, 7), lambda: views.padded_sizes(2, 500, 7)):
        with pytest.raises(DataError, match="image 7: 2×500 pixels"):
            call()
