"""Only what is asked for is computed, and it is what the whole prediction holds."""

from itertools import combinations
from unittest import mock

import numpy as np
import pytest
import torch

from tests.models.small import SAMPLES, small_network, training_batch
from tests.models.test_multi_scale import photo_of, views_of
from upsnet.dataset.batches import collate
from upsnet.models import upsnet as system
from upsnet.models.box_head import DetectionOptions
from upsnet.models.rpn import ProposalOptions
from upsnet.models.upsnet import SelectionOptions
from upsnet.structures.results import OUTPUTS

SUBSETS = [frozenset(part) for count in (1, 2, 3) for part in combinations(sorted(OUTPUTS), count)]
HEADS = ("rpn", "box_head", "mask_head", "semantic_head")
THINGS_ALONE, MAP_ALONE, SEMANTIC_ALONE = (frozenset({name}) for name in ("instances", "panoptic", "semantic"))


def network_of(weak=0.3, strong=0.4):
    options = SelectionOptions(
        ProposalOptions(pre_nms=60, post_nms=40), DetectionOptions(weak, max_detections=20), strong, stuff_area_limit=16
    )
    return small_network(lively=True, selection=options).eval()


def batch_of(kind):
    if kind == "one view":
        return training_batch(*SAMPLES)
    return collate([views_of(64, 96).sample(photo_of((40, 60), seed), seed, "") for seed in range(2)])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["one view", "four views"])
@pytest.mark.parametrize("thresholds", [(0.3, 0.4), (0.4, 0.3)], ids=str)
@pytest.mark.parametrize("outputs", SUBSETS, ids=lambda outputs: "+".join(sorted(outputs)))
def test_a_part_is_that_of_the_whole(outputs, thresholds, kind):
    network, batch = network_of(*thresholds), batch_of(kind)
    for whole, part in zip(network(batch), network(batch, outputs), strict=True):
        assert (part.image_id, part.file_name) == (whole.image_id, whole.file_name)
        given = {"panoptic": part.segment_map, "instances": part.instances, "semantic": part.semantic_map}
        assert {name for name, value in given.items() if value is not None} == outputs
        if "panoptic" in outputs:
            assert np.array_equal(part.segment_map, whole.segment_map) and part.segments == whole.segments
        else:
            assert part.segments == []
        if "instances" in outputs:
            assert part.instances.masks == whole.instances.masks
            assert np.array_equal(part.instances.boxes, whole.instances.boxes)
        if "semantic" in outputs:
            assert np.array_equal(part.semantic_map, whole.semantic_map)


@torch.no_grad()
@pytest.mark.parametrize(
    ("outputs", "heads", "functions"),
    [
        (OUTPUTS, HEADS, {"suppress": 2, "detections_on_photo": 1, "fuse": 1, "labels_on_photo": 2}),
        (MAP_ALONE, HEADS, {"suppress": 1, "fuse": 1, "labels_on_photo": 2}),
        (THINGS_ALONE, HEADS[:3], {"suppress": 1, "detections_on_photo": 1}),
        (SEMANTIC_ALONE, HEADS[3:], {"fuse": 1, "labels_on_photo": 1}),
    ],
    ids=lambda value: "+".join(sorted(value)) if isinstance(value, frozenset) else "",
)
def test_what_nobody_asked_for_is_not_computed(outputs, heads, functions):
    network, ran = network_of(), []
    for name in HEADS:
        network.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    calls = {name: mock.Mock(wraps=getattr(system, name)) for name in ("suppress", "fuse", "labels_on_photo")}
    calls["detections_on_photo"] = mock.Mock(wraps=system.detections_on_photo)
    with mock.patch.multiple(system, **calls):
        network(training_batch("things and stuff"), outputs)
    assert set(ran) == set(heads)
    assert {name: call.call_count for name, call in calls.items() if call.call_count} == functions


@torch.no_grad()
def test_masks_of_what_is_asked_for_alone():
    network, rois = network_of(weak=0.0, strong=0.6), []
    network.mask_head.register_forward_hook(lambda _, given, __: rois.append(len(given[1])))
    for outputs in (OUTPUTS, THINGS_ALONE, MAP_ALONE):
        network(training_batch("things and stuff"), outputs)
    of_all, of_detections, of_map = rois
    assert 0 < of_map < of_detections <= of_all


@torch.no_grad()
def test_boxes_below_the_threshold_of_the_map_are_not_decoded_for_it():
    network, found = network_of(weak=0.0, strong=0.6), []
    decode = mock.Mock(side_effect=lambda *given: found.append(system_decode(*given)) or found[-1])
    system_decode = system.decode_above
    with mock.patch.object(system, "decode_above", decode):
        network(training_batch("things and stuff"), MAP_ALONE)
        network(training_batch("things and stuff"), THINGS_ALONE)
    assert len(found[0]) < len(found[1]) and float(found[0].scores.min()) > 0.6
