import logging
import pickle

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader

from tests.miniature import edited, image_id_of, write_miniature
from tests.reference.labels import segment_summary
from upsnet.dataset.batches import Draw, SamePaddedSizeSampler, TrainingSampler, collate, start_loader_process
from upsnet.dataset.coco_panoptic import CocoPanoptic
from upsnet.dataset.image_sets import ImageSet, coco_image_sets
from upsnet.dataset.transforms import Transform
from upsnet.structures.errors import DataError
from upsnet.structures.masks import Bitmap, Polygons
from upsnet.structures.panoptic_png import id_to_rgb
from upsnet.structures.sample import VOID
from upsnet.structures.segment_runs import SegmentRuns

TRANSFORM = Transform((60,), 200)


def open_miniature(folder, transform=TRANSFORM, image_set="train", **options):
    return CocoPanoptic(coco_image_sets(folder, image_set), transform, **options)


@pytest.mark.parametrize("seed", range(4))
def test_runs_equal_their_slow_twin(seed):
    draws = np.random.default_rng(seed)
    segment_map = draws.choice([0, 1, 256, 70000], (9, 13)).astype(np.int32)
    segment_map[2:6, 3:] = 5  # runs that reach the edge and meet the next row
    runs = SegmentRuns.of(segment_map)
    summary = {
        i: (a, tuple(b)) for i, a, b in zip(runs.ids.tolist(), runs.areas.tolist(), runs.boxes.tolist(), strict=True)
    }
    assert summary == segment_summary(segment_map)
    assert (runs.paint(np.arange(len(runs.ids), dtype=np.int16)) == np.searchsorted(runs.ids, segment_map)).all()


def test_images_come_in_ascending_id(tmp_path):
    data_set = open_miniature(write_miniature(tmp_path))
    assert data_set.image_ids.tolist() == [image_id_of(i) for i in range(6)] == [3, 10, 17, 24, 31, 38]
    assert data_set.sizes.tolist() == [[48, 64], [48, 64], [64, 48]] * 2
    assert data_set.file_names == [f"{image_id:012d}.jpg" for image_id in data_set.image_ids]
    for i in range(6):
        assert data_set[i].image_id == data_set.truth(i).image_id == data_set.image_ids[i]
        assert data_set.photo(i).shape == (*data_set.sizes[i], 3)
        assert data_set[i].file_name == data_set.truth(i).file_name == data_set.file_names[i]


def test_names_of_the_folders_above_do_not_matter(tmp_path):
    """The original finds labels by replacing these words wherever they stand in a photo's path."""
    above = tmp_path / "images" / "train2017" / "leftImg8bit.png" / "jpg"
    here, there = (open_miniature(write_miniature(folder)) for folder in (tmp_path / "plain", above))
    for i in range(len(here)):
        assert torch.equal(here[i].targets.semantic, there[i].targets.semantic)


def test_truth_of_an_image(tmp_path):
    data_set = open_miniature(write_miniature(tmp_path))
    truth = data_set.truth(2)
    assert truth.segment_map.shape == (64, 48)
    names = {s.id: data_set.categories[s.semantic_id].name for s in truth.segments}
    assert names[41] == "grass" and names[70000] == "sky" and len(names) == 5
    assert [s.id for s in truth.segments if s.is_crowd] == [999]
    slow = segment_summary(truth.segment_map)
    assert {s.id: (s.area, s.bbox) for s in truth.segments} == slow
    assert all(s.score is None for s in truth.segments)


def test_void_is_no_class_and_no_segment(tmp_path):
    data_set = open_miniature(write_miniature(tmp_path))
    truth = data_set.truth(1)
    void = truth.segment_map == 0
    assert void.any() and (truth.semantic_map[void] == VOID).all() and (truth.semantic_map[~void] >= 0).all()
    assert 0 not in {s.id for s in truth.segments}
    assert (data_set[1].targets.semantic == VOID).any()


@pytest.mark.parametrize("instances", [False, True])
def test_targets_with_and_without_an_instances_json(tmp_path, instances):
    data_set = open_miniature(write_miniature(tmp_path, instances=instances))
    sample = data_set[2]
    found = sample.targets.instances
    assert len(found) == 3 and found.is_crowd.tolist() == [True, False, False]
    kind = Polygons if instances else Bitmap
    assert isinstance(found.masks[1], kind) and isinstance(found.masks[0], Bitmap)
    assert found.boxes.dtype == torch.float32 and found.classes.dtype == torch.int64
    assert found.boxes[0].tolist() == [34, 2, 45, 17]
    assert found.boxes[1].tolist() == [2, 3, 17, 34]
    records = {a["bbox"][0]: a["category_id"] for a in data_set.truth(2).annotations}
    for box, thing_class in zip(found.boxes, found.classes, strict=True):
        assert data_set.categories.of_thing(int(thing_class)).id == records[float(box[0])]
    assert sample.targets.quarter_masks.shape == (2, round(sample.size[0] / 4), round(sample.size[1] / 4))


@pytest.mark.parametrize("instances", [False, True])
def test_annotations_describe_the_masks(tmp_path, instances):
    data_set = open_miniature(write_miniature(tmp_path, instances=instances))
    annotations = [a for i in range(6) for a in data_set.truth(i).annotations]
    assert len({a["id"] for a in annotations}) == len(annotations) == 11 and 0 not in {a["id"] for a in annotations}
    assert sum(a["iscrowd"] for a in annotations) == 1
    for i in range(6):
        for a in data_set.truth(i).annotations:
            assert a["image_id"] == data_set.image_ids[i]
            if not instances:
                mask = coco_mask.decode(a["segmentation"])
                assert mask.shape == tuple(data_set.sizes[i]) and mask.sum() == a["area"]
                assert coco_mask.toBbox(a["segmentation"]).tolist() == a["bbox"]


def test_made_up_ids_stay_distinct_over_joined_sets(tmp_path):
    write_miniature(tmp_path, "train")
    write_miniature(tmp_path, "val", images=12)
    with edited(tmp_path / "annotations/panoptic_val.json") as content:
        for record in content["images"]:
            record["id"] += 1000
        for record in content["annotations"]:
            record["image_id"] += 1000
    data_set = open_miniature(tmp_path, image_set="train+val")
    assert len(data_set) == 18 and data_set.image_ids[6] == 1003
    ids = [a["id"] for i in range(18) for a in data_set.truth(i).annotations]
    assert len(set(ids)) == len(ids)
    assert open_miniature(tmp_path, image_set="train+val", limit=8).image_ids.tolist()[5:] == [38, 1003, 1010]


def test_a_mirrored_copy_is_the_mirror_image(tmp_path):
    for instances in (False, True):
        data_set = open_miniature(
            write_miniature(tmp_path, instances=instances), Transform((48,), 64), flip_copies=True
        )
        assert len(data_set) == 12 and data_set.num_photos == 6
        for i in range(6):
            original, mirrored = data_set[i], data_set[i + 6]
            assert mirrored.flipped and mirrored.scale == original.scale == 1.0
            torch.testing.assert_close(mirrored.image, original.image.flip(-1))
            assert torch.equal(mirrored.targets.semantic, original.targets.semantic.flip(-1))
            ours, theirs = mirrored.targets.instances, original.targets.instances
            width = original.size[1]
            assert torch.equal(ours.boxes[:, 0], width - 1 - theirs.boxes[:, 2])
            assert torch.equal(ours.boxes[:, 2], width - 1 - theirs.boxes[:, 0])
            assert torch.equal(ours.classes, theirs.classes)
            for mask, other in zip(ours.masks, theirs.masks, strict=True):
                if isinstance(mask, Bitmap):
                    assert (mask.draw(*original.size) == other.draw(*original.size)[:, ::-1]).all()


def test_images_without_things_or_without_stuff(tmp_path):
    data_set = open_miniature(write_miniature(tmp_path))
    stuff_only, things_only = data_set[3].targets, data_set[4].targets
    assert len(stuff_only.instances) == 0 and stuff_only.quarter_masks.shape[0] == 0
    assert data_set.truth(3).annotations == [] and len(data_set.truth(3).segments) == 2
    assert len(things_only.instances) == 2 and (things_only.semantic >= 2).all()


@pytest.mark.parametrize("instances", [False, True])
def test_training_leaves_out_images_without_things_and_says_so(tmp_path, instances, caplog):
    with caplog.at_level(logging.INFO, "upsnet"):
        data_set = open_miniature(write_miniature(tmp_path, instances=instances), skip_without_things=True)
    assert data_set.image_ids.tolist() == [3, 10, 17, 31, 38]
    assert "1 of 6 images" in caplog.text


def test_a_set_of_stuff_only_cannot_train_instances(tmp_path):
    folder = write_miniature(tmp_path)
    with edited(folder / "annotations/panoptic_train.json") as content:
        content["images"] = [record for record in content["images"] if record["id"] == 24]
        content["annotations"] = [record for record in content["annotations"] if record["image_id"] == 24]
    assert len(open_miniature(folder)) == 1
    with pytest.raises(DataError, match=r"panoptic_train\.json: none of 1 images"):
        open_miniature(folder, skip_without_things=True)


def test_a_thing_of_one_pixel_is_truth_but_no_target(tmp_path):
    data_set = open_miniature(write_miniature(tmp_path))
    assert any(s.area == 1 and data_set.categories[s.semantic_id].is_thing for s in data_set.truth(5).segments)
    assert len(data_set[5].targets.instances) == 2 and len(data_set.truth(5).annotations) == 3


def test_box_rules(tmp_path):
    folder = write_miniature(tmp_path, images=1, instances=True)
    with edited(folder / "annotations/instances_train.json") as content:
        template = content["annotations"][0]
        variants = [
            {"bbox": [-5.5, 2, 20, 30]},  # clipped on the left
            {"bbox": [50.25, 30.5, 100, 100]},  # clipped on the right and below
            {"bbox": [5, 5, 1, 20]},  # one pixel wide
            {"bbox": [5, 5, 20, 0.5]},  # flat
            {"bbox": [5, 5, 9, 9], "area": 0},
            {"bbox": [5, 5, 9, 9], "area": 3},
            {"bbox": [5, 5, 9, 9], "ignore": 1},
            {"segmentation": [[1, 2, 3, 4]]},  # two corners
            {"segmentation": [[1, 2, 3, 4], [5, 5, 9, 5, 9, 9]], "bbox": [5, 5, 5, 5]},
        ]
        content["annotations"] = [{**template, "id": 100 + i, **change} for i, change in enumerate(variants)]
    boxes = open_miniature(folder, min_area=4)[0].targets.instances.boxes.tolist()
    assert boxes == [[0, 2, 13.5, 31], [50.25, 30.5, 63, 47], [5, 5, 9, 9]]
    data_set = open_miniature(folder)
    assert len(data_set[0].targets.instances) == 4
    assert [a["id"] for a in data_set.truth(0).annotations] == [100, 101, 102, 103, 104, 105, 106, 108]
    assert data_set.truth(0).annotations[-1]["segmentation"] == [[5, 5, 9, 5, 9, 9]]


def test_more_than_255_segments(tmp_path):
    folder = write_miniature(tmp_path, images=1, size=(64, 96))
    ids = np.arange(1, 385).reshape(16, 24) * 37
    segment_map = np.kron(ids, np.ones((4, 4), dtype=int)).astype(np.int32)
    cv2.imwrite(str(folder / "annotations/panoptic_train/000000000003.png"), id_to_rgb(segment_map)[..., ::-1])
    with edited(folder / "annotations/panoptic_train.json") as content:
        content["annotations"][0]["segments_info"] = [
            {"id": int(i), "category_id": (90, 12, 3)[i % 3], "iscrowd": 0} for i in ids.ravel()[::-1]
        ]
    data_set = open_miniature(folder)
    truth, found = data_set.truth(0), data_set[0].targets.instances
    assert len(truth.segments) == len(found) == 384 == len(truth.annotations)
    assert (truth.segment_map == segment_map).all()
    for i in (0, 200, 383):  # in the order of the json
        segment_id = int(ids.ravel()[::-1][i])
        assert (found.masks[i].draw(64, 96) == (segment_map == segment_id)).all()
        assert data_set.categories.of_thing(int(found.classes[i])).id == (90, 12, 3)[segment_id % 3]


def test_the_step_governs_the_scale(tmp_path):
    transform = Transform((30, 40, 50, 60), 400, seed=1)
    data_set = open_miniature(write_miniature(tmp_path), transform)
    scales = [data_set[Draw(0, step)].scale for step in range(40)]
    assert len(set(scales)) == 4 and scales == [data_set[Draw(0, step)].scale for step in range(40)]
    sample = data_set[Draw(0, 7)]
    assert sample.size == (round(48 * sample.scale), round(64 * sample.scale))


def test_loader_processes_give_the_same_batches(tmp_path):
    data_set = open_miniature(write_miniature(tmp_path, instances=True), Transform((40, 60), 100), flip_copies=True)
    sampler = TrainingSampler(len(data_set), batch_size=2, steps=3)
    plain = [collate([data_set[draw] for draw in draws]) for draws in sampler]
    loader = DataLoader(
        data_set, batch_sampler=sampler, collate_fn=collate, num_workers=1, worker_init_fn=start_loader_process
    )
    for ours, theirs in zip(loader, plain, strict=True):
        assert ours.image_ids == theirs.image_ids and torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.semantic, theirs.semantic)
        assert all(torch.equal(a, b) for a, b in zip(ours.quarter_masks, theirs.quarter_masks, strict=True))


def test_testing_batches_match_the_padded_sizes(tmp_path):
    data_set = open_miniature(write_miniature(tmp_path, images=9), targets=False)
    for batch in SamePaddedSizeSampler(data_set.padded_sizes(), 4):
        alone = [collate([data_set[i]]).images for i in batch]
        together = collate([data_set[i] for i in batch])
        assert torch.equal(together.images, torch.cat(alone)) and together.instances is None


def test_targets_can_be_left_out_without_reading_labels(tmp_path):
    folder = write_miniature(tmp_path)
    for path in (folder / "annotations/panoptic_train").iterdir():
        path.unlink()
    assert open_miniature(folder, targets=False)[0].targets is None


def test_plain_indices_end_where_the_data_set_ends(tmp_path):
    data_set = open_miniature(write_miniature(tmp_path), limit=2)
    assert len(list(data_set)) == 2
    for entry in (-1, 2):
        with pytest.raises(IndexError):
            data_set[entry]
    with pytest.raises(TypeError, match="transform"):
        open_miniature(tmp_path, transform=None)[0]


def test_one_set_by_its_files(tmp_path):
    folder = write_miniature(tmp_path)
    files = ImageSet(
        folder / "annotations/panoptic_train.json", folder / "annotations/panoptic_train", folder / "images/train"
    )
    data_set = CocoPanoptic(files, TRANSFORM)
    assert len(data_set) == 6 and len(pickle.loads(pickle.dumps(data_set))) == 6
