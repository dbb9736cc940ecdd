"""200 real COCO images."""

import numpy as np
import pytest
import torch

from upsnet.dataset.batches import collate
from upsnet.dataset.coco_panoptic import CocoPanoptic
from upsnet.dataset.image_sets import coco_image_sets
from upsnet.dataset.transforms import Transform, padded_size
from upsnet.structures.panoptic_png import id_to_rgb, rgb_to_id
from upsnet.structures.sample import VOID


@pytest.mark.parametrize(("image_set", "segments", "things"), [("train2017", 1111, 747), ("val2017", 1078, 712)])
def test_every_image_loads(shared, image_set, segments, things):
    data_set = CocoPanoptic(coco_image_sets(shared("data/coco_mini"), image_set), Transform((128,), 256))
    assert len(data_set) == 100 and data_set.categories.num_stuff == 53 and data_set.categories.num_things == 80
    assert (np.diff(data_set.image_ids) > 0).all()
    found, annotations = 0, 0
    for i in range(len(data_set)):
        truth, sample = data_set.truth(i), data_set[i]
        found, annotations = found + len(truth.segments), annotations + len(truth.annotations)
        assert (rgb_to_id(id_to_rgb(truth.segment_map)) == truth.segment_map).all()
        painted = np.full(truth.segment_map.shape, VOID)
        for segment in truth.segments:
            inside = truth.segment_map == segment.id
            assert inside.sum() == segment.area
            painted[inside] = segment.semantic_id
        assert (painted == truth.semantic_map).all()
        targets = sample.targets
        assert targets.semantic.shape == sample.size == sample.image.shape[1:]
        assert len(targets.quarter_masks) == len(targets.instances.without_crowd())
        assert torch.isfinite(sample.image).all()
    assert (found, annotations) == (segments, things)


def test_sets_joined_and_batches_of_real_images(shared):
    folder = shared("data/coco_mini")
    data_set = CocoPanoptic(
        coco_image_sets(folder, "train2017+val2017"),
        Transform((64, 96), 160),
        flip_copies=True,
        skip_without_things=True,
    )
    assert len(data_set) == 2 * data_set.num_photos and 180 < data_set.num_photos < 200
    original, mirrored = data_set[150], data_set[150 + data_set.num_photos]
    assert original.image_id == mirrored.image_id and mirrored.flipped and not original.flipped
    batch = collate([data_set[i] for i in (0, 150, 150 + data_set.num_photos)])
    assert batch.images.shape[-2:] == padded_size((max(h for h, _ in batch.sizes), max(w for _, w in batch.sizes)))


def test_with_and_without_the_instances_json(shared):
    """The val json was made from the PNGs, so both ways must give the same instances."""
    (files,) = coco_image_sets(shared("data/coco_mini"), "val2017")
    with_json = CocoPanoptic(files, Transform((200,), 400), limit=20)
    without = type(files)(files.panoptic_json, files.png_dir, files.image_dir)
    from_png = CocoPanoptic(without, Transform((200,), 400), limit=20)
    for i in range(20):
        ours, theirs = from_png[i].targets, with_json[i].targets
        order = sorted(range(len(ours.instances)), key=lambda k: ours.instances.boxes[k].tolist())
        other = sorted(range(len(theirs.instances)), key=lambda k: theirs.instances.boxes[k].tolist())
        assert torch.equal(ours.instances.boxes[order], theirs.instances.boxes[other])
        assert torch.equal(ours.instances.classes[order], theirs.instances.classes[other])
        size = from_png.sizes[i]
        drawn, others = ours.instances.masks.draw(*size)[order], theirs.instances.masks.draw(*size)[other]
        assert (drawn == others).all()
        assert sorted(a["area"] for a in from_png.truth(i).annotations) == sorted(
            a["area"] for a in with_json.truth(i).annotations
        )
