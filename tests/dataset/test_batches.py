from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch

from tests.miniature import write_miniature
from upsnet.dataset.batches import Draw, SamePaddedSizeSampler, TrainingSampler, collate
from upsnet.dataset.coco_panoptic import CocoPanoptic
from upsnet.dataset.image_sets import coco_image_sets
from upsnet.dataset.loading import BatchLoader
from upsnet.dataset.transforms import Transform
from upsnet.structures.masks import Masks
from upsnet.structures.sample import VOID, Instances, Sample, Targets


def sample(image_id, height, width, targets=True):
    none = Instances(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.bool), Masks([]))
    given = Targets(
        instances=none,
        semantic=torch.full((height, width), 3, dtype=torch.int16),
        quarter_masks=torch.ones(image_id, round(height / 4), round(width / 4), dtype=torch.bool),
    )
    image = torch.full((3, height, width), float(image_id))
    return Sample(image_id, f"{image_id}.jpg", image, (height * 2, width * 2), 0.5, False, given if targets else None)


def test_collation_pads_right_and_bottom():
    batch = collate([sample(1, 33, 40), sample(2, 64, 30)])
    assert batch.images.shape == (2, 3, 64, 64) and batch.semantic.shape == (2, 64, 64)
    assert (batch.images[0, :, :33, :40] == 1).all() and batch.images[0].sum() == 3 * 33 * 40
    assert (batch.semantic[0, :33, :40] == 3).all() and (batch.semantic[0, 33:] == VOID).all()
    assert (batch.semantic[0, :, 40:] == VOID).all() and batch.semantic.dtype == torch.int16
    assert [m.shape for m in batch.quarter_masks] == [(1, 16, 16), (2, 16, 16)]
    assert batch.quarter_masks[1].sum() == 2 * 16 * 8 and batch.quarter_masks[0].dtype == torch.bool
    assert batch.sizes == [(33, 40), (64, 30)] and batch.original_sizes == [(66, 80), (128, 60)]
    assert batch.image_ids == [1, 2] and batch.file_names == ["1.jpg", "2.jpg"] and batch.scales == [0.5, 0.5]
    assert len(batch.instances) == len(batch) == 2


def test_another_stride_and_no_targets():
    batch = collate([sample(1, 33, 40, targets=False)], stride=64)
    assert batch.images.shape == (1, 3, 64, 64)
    assert batch.instances is None and batch.semantic is None and batch.quarter_masks is None


def entries(length, batch_size, accumulation, num_workers, **options):
    """{step: entries in order} over all workers."""
    seen = {}
    per_worker = [
        list(TrainingSampler(length, batch_size, accumulation, worker, num_workers, **options))
        for worker in range(num_workers)
    ]
    for worker in per_worker:
        for batch in worker:
            assert len(batch) == batch_size and len({draw.step for draw in batch}) == 1
            seen.setdefault(batch[0].step, []).extend(draw.entry for draw in batch)
    return seen


def test_every_split_of_the_total_batch_sees_the_same():
    options = {"seed": 5, "steps": 13}
    whole = entries(10, 4, 1, 1, **options)
    assert list(whole) == list(range(13))
    assert entries(10, 1, 4, 1, **options) == whole
    assert entries(10, 2, 1, 2, **options) == whole
    assert entries(10, 1, 2, 2, **options) == whole
    assert entries(10, 1, 1, 4, **options) == whole


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pixels_and_targets_depend_on_seed_step_and_image_alone(tmp_path, num_workers):
    """Drawn scales, mirrored copies: whichever worker and loader process makes a sample, it is the same."""
    files = coco_image_sets(write_miniature(tmp_path), "train")
    data = CocoPanoptic(files, Transform((32, 48, 64), 96, (103, 116, 123), seed=3), flip_copies=True)

    def seen(count, batch_size, accumulation):
        of_workers = []
        for worker in range(count):
            sampler = TrainingSampler(len(data), batch_size, accumulation, worker, count, seed=3, steps=4)
            batches = list(BatchLoader(data, sampler, num_workers))
            of_workers.append([batches[i : i + accumulation] for i in range(0, len(batches), accumulation)])
        rows = []
        for step in zip(*of_workers, strict=True):
            for batch in chain.from_iterable(step):
                for i, (height, width) in enumerate(batch.sizes):
                    image, semantic = batch.images[i, :, :height, :width], batch.semantic[i, :height, :width]
                    of_batch = batch.image_ids[i], batch.flipped[i], batch.scales[i], len(batch.instances[i])
                    rows.append((*of_batch, image.numpy().tobytes(), semantic.numpy().tobytes()))
        return rows

    alone = seen(1, 4, 1)
    assert len(alone) == 16 and len({row[2] for row in alone}) > 2
    assert seen(2, 2, 1) == seen(4, 1, 1) == seen(2, 1, 2) == alone


def test_an_epoch_visits_every_entry_once():
    row = [e for batch in entries(7, 3, 1, 1, seed=1, steps=14).values() for e in batch]
    epochs = [row[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 3


def test_a_resumed_run_goes_on_where_it_stopped():
    whole = list(TrainingSampler(11, 2, 2, seed=9, steps=40))
    for start in (1, 17, 39, 40):
        resumed = TrainingSampler(11, 2, 2, seed=9, start_step=start, steps=40)
        assert list(resumed) == whole[start * 2 :] and len(resumed) == len(whole) - start * 2


def test_without_shuffling_the_order_is_that_of_the_data_set():
    row = [e for batch in entries(5, 2, 1, 1, seed=4, steps=5, shuffle=False).values() for e in batch]
    assert row == [0, 1, 2, 3, 4] * 2


def test_a_step_larger_than_the_data_set():
    (batch,) = TrainingSampler(3, 8, seed=2, steps=1)
    assert max(Counter(draw.entry for draw in batch).values()) <= 3
    assert all(isinstance(draw, Draw) for draw in batch)


def test_other_seeds_give_other_orders():
    assert list(TrainingSampler(50, 4, seed=1, steps=5)) != list(TrainingSampler(50, 4, seed=2, steps=5))
    with pytest.raises(ValueError, match="entry"):
        TrainingSampler(0, 1)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_test_batches_hold_one_padded_size(batch_size):
    draws = np.random.default_rng(0)
    sizes = [(int(h) * 32, int(w) * 32) for h, w in draws.integers(1, 4, (50, 2))]
    batches = list(SamePaddedSizeSampler(sizes, batch_size))
    assert sorted(i for batch in batches for i in batch) == list(range(50))
    assert all(len({sizes[i] for i in batch}) == 1 and len(batch) <= batch_size for batch in batches)
    assert len(SamePaddedSizeSampler(sizes, batch_size)) == len(batches)
    full = sum(-(-n // batch_size) for n in Counter(sizes).values())
    assert len(batches) == full, "as few batches as can be"


@pytest.mark.parametrize("workers", [2, 3, 20])
def test_workers_share_test_batches_out(workers):
    sizes = [(32 * (i % 3), 32) for i in range(25)]
    dealt = [list(SamePaddedSizeSampler(sizes, 2, worker, workers)) for worker in range(workers)]
    assert sorted(batch for share in dealt for batch in share) == list(SamePaddedSizeSampler(sizes, 2))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
