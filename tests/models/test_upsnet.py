"""The whole network, on images of every kind."""

import pytest
import torch

from tests.models.small import LOSSES, SAMPLES, photo_sample, small_network, training_batch
from tests.models.test_batches import samples_of
from tests.syncs import count_syncs
from upsnet.dataset.batches import collate
from upsnet.models.box_head import DetectionOptions, suppress
from upsnet.models.matching import AnchorSampling, RoISampling
from upsnet.models.rpn import ProposalOptions
from upsnet.models.upsnet import SamplingOptions, SelectionOptions, quarter_labels
from upsnet.operators import library
from upsnet.structures.sample import VOID

close = torch.testing.assert_close


def total(output):
    return torch.stack(list(output.losses.values())).sum()


@pytest.mark.parametrize("options", [{}, {"norm": "group_norm"}, {"deformable_from": 4}], ids=str)
def test_every_loss_is_there_and_every_parameter_learns(options):
    network = small_network(**options).train()
    output = network(training_batch("things and stuff", "things and crowd"))
    assert set(output.losses) == LOSSES and set(output.metrics) == {"rcnn_accuracy", "panoptic_accuracy"}
    assert all(loss.isfinite() and loss > 0 and loss.shape == () for loss in output.losses.values())
    assert all(0 <= metric <= 1 and not metric.requires_grad for metric in output.metrics.values())
    total(output).backward()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize(("norm", "fraction"), [("none", 0.7), ("none", 1.0), ("batch_norm", 0.7)])
@pytest.mark.parametrize("kind", SAMPLES)
def test_images_of_every_kind(kind, norm, fraction):
    sampling = SamplingOptions(
        AnchorSampling(64), ProposalOptions(100, 50), RoISampling(32), keep_fraction=fraction, with_roi_loss=True
    )
    network = small_network(norm=norm, sampling=sampling).train()
    assert network.has_unknown == (fraction < 1)
    output = network(training_batch(kind))
    assert set(output.losses) == LOSSES and all(loss.isfinite() for loss in output.losses.values())
    total(output).backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)
    assert all(value.isfinite().all() for value in network.state_dict().values())
    singles = len(SAMPLES[kind].get("things", []))
    assert (output.losses["mask_loss"] > 0) == (singles > 0)
    assert (output.losses["fcn_roi_loss"] > 0) == (singles > 0 and kind != "void everywhere")
    labelled = kind not in ("void everywhere", "nothing at all")
    assert (output.losses["fcn_loss"] > 0) == labelled
    assert (output.losses["rpn_cls_loss"] > 0) and (output.losses["cls_loss"] > 0)


def test_a_mixed_batch_is_the_mean_of_its_images():
    # Group norm, so that images do not see each other; one padded size, so that the padding is the same.
    network = small_network(norm="group_norm", backbone_norm="group_norm").train()
    with torch.no_grad():
        single = [network(training_batch(kind)) for kind in SAMPLES]
        mixed = network(training_batch(*SAMPLES))
        backwards = network(training_batch(*reversed(SAMPLES)))
    for name, loss in mixed.losses.items():
        close(loss, torch.stack([output.losses[name] for output in single]).mean(), rtol=1e-4, atol=1e-5)
        close(loss, backwards.losses[name], rtol=1e-4, atol=1e-5)
    for name, metric in mixed.metrics.items():
        close(metric, torch.stack([output.metrics[name] for output in single]).mean(), rtol=1e-3, atol=1e-3)


def test_other_draws_give_other_losses():
    network = small_network().train()
    names = ("things and stuff", "things and crowd")
    with torch.no_grad():
        first, same, other = (network(training_batch(*names, seed=seed)).losses for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in LOSSES)
    assert any(not torch.equal(first[name], other[name]) for name in ("rpn_cls_loss", "cls_loss"))


def test_neither_proposals_nor_truth():
    sampling = SamplingOptions(
        AnchorSampling(64), ProposalOptions(100, 50, min_size=1000.0), RoISampling(32), with_roi_loss=True
    )
    network = small_network(sampling=sampling).train()
    for kinds in (["no things"], ["nothing at all", "things and stuff"]):
        output = network(training_batch(*kinds))
        assert all(loss.isfinite() for loss in output.losses.values())
        total(output).backward()


def test_a_class_table_without_stuff():
    for fraction in (0.7, 1.0):
        sampling = SamplingOptions(AnchorSampling(64), ProposalOptions(100, 50), RoISampling(32), fraction)
        network = small_network(stuff=0, things=4, sampling=sampling, lively=True)
        samples = [photo_sample(1, stuff=False), photo_sample(2, stuff=False, things=[(1, (4, 4, 30, 30))])]
        for sample in samples:  # semantic ids of a table without stuff start at the things
            sample.targets.semantic[sample.targets.semantic >= 0] = 0
        batch = collate(samples)
        batch.draws = training_batch("no stuff", "no stuff").draws
        output = network.train()(batch)
        assert all(loss.isfinite() for loss in output.losses.values())
        assert "fcn_roi_loss" not in output.losses
        total(output).backward()
        with torch.no_grad():
            for prediction in network.eval()(batch):
                assert all(segment.score is not None for segment in prediction.segments)
                assert prediction.segment_map.shape == (48, 64)


def test_autocast():
    network = small_network(lively=True).train()
    batch = training_batch("things and stuff", "no things", "one pixel")
    exact = network(batch).losses
    batch = training_batch("things and stuff", "no things", "one pixel")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(batch)
        loss = total(output)
    loss.backward()
    assert all(value.dtype == torch.float32 and value.isfinite() for value in output.losses.values())
    for name in ("fcn_loss", "rpn_cls_loss", "cls_loss"):
        close(output.losses[name], exact[name], rtol=0.1, atol=0.05)
    grads = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        predictions = network.eval()(batch)
    assert all(prediction.segment_map.shape == (48, 64) for prediction in predictions)
    assert all(prediction.instances.scores.dtype == "float32" for prediction in predictions)


@torch.no_grad()
def test_what_is_detection_and_candidate_passes_the_mask_head_once(monkeypatch):
    network = small_network(seed=1, lively=True).eval()
    batch, rois, lists = training_batch("things and stuff", "one pixel"), [], []
    monkeypatch.setattr("upsnet.models.upsnet.suppress", lambda *a, **k: lists.append(suppress(*a, **k)) or lists[-1])
    network.mask_head.register_forward_hook(lambda head, given, masks: rois.append(given[1]))
    network(batch)
    (seen,) = rois
    sets = [set(positions.tolist()) for positions in lists]
    assert len(seen) == len(sets[0] | sets[1]) + len(sets[2] | sets[3]) < sum(map(len, sets))


@pytest.mark.skipif(not library.native_in_use(), reason=library.NOT_IN_USE_BECAUSE)
@torch.inference_mode()
def test_the_number_of_waits_for_a_device_does_not_depend_on_the_number_of_instances():
    batch, waits, instances = collate(samples_of(2)), [], set()
    for threshold in (0.3, 0.999, 1.0):
        detections = DetectionOptions(threshold, max_detections=20)
        selection = SelectionOptions(ProposalOptions(pre_nms=60, post_nms=40), detections, max(threshold, 0.4))
        network = small_network(seed=1, lively=True, selection=selection).eval()
        with count_syncs() as syncs:
            predictions = network(batch)
        waits.append(syncs.counts)
        instances.add(tuple(len(prediction.instances) for prediction in predictions))
    assert waits[0] == waits[1] == waits[2] and len(instances) == 3 and (0, 0) in instances


@pytest.mark.parametrize("size", [(48, 64), (33, 35), (34, 38), (30, 61)])
def test_quarter_labels(size):
    labels = torch.arange(64 * 64, dtype=torch.int16).reshape(64, 64)
    quarter = quarter_labels(labels, size)
    height, width = round(size[0] / 4), round(size[1] / 4)
    assert torch.equal(quarter[:height, :width], labels[0 : 4 * height : 4, 0 : 4 * width : 4])
    assert (quarter[height:] == VOID).all() and (quarter[:, width:] == VOID).all() and quarter.shape == (16, 16)
    assert not (labels == VOID).any()  # the given map stays as it is
