"""What goes wrong in a loader process arrives as it was raised."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
from torch.utils.data import Dataset

from upsnet.dataset.batches import SECONDS_AFTER_SIGTERM, Draw, SamePaddedSizeSampler, TrainingSampler
from upsnet.dataset.loading import BatchLoader
from upsnet.structures.errors import DataError, PlaceError
from upsnet.structures.sample import Sample

SENTENCE = "image 3: photos/3.jpg: is damaged or not a picture: copy or download it again"


class Samples(Dataset):
    """Entry i is a picture of the value i; one of them may be damaged."""

    def __init__(self, damaged=None, error=DataError):
        self.damaged, self.error = damaged, error

    def __getitem__(self, index):
        entry = index.entry if isinstance(index, Draw) else index
        if entry == self.damaged:
            raise self.error(SENTENCE)
        return Sample(entry, f"{entry}.jpg", torch.full((3, 32, 32), float(entry)), (32, 32), 1.0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_in_the_order_of_the_sampler(num_workers):
    loader = BatchLoader(Samples(), SamePaddedSizeSampler([(32, 32)] * 5, 2), num_workers)
    assert len(loader) == 3
    for _ in range(2):
        batches = list(loader)
        assert [batch.image_ids for batch in batches] == [[0, 1], [2, 3], [4]]
        assert [int(batch.images.mean() * 2) for batch in batches] == [1, 5, 8]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_gpu_gets_pinned_memory(num_workers):
    for batch in BatchLoader(Samples(), SamePaddedSizeSampler([(32, 32)] * 5, 2), num_workers):
        assert batch.images.is_pinned()
        assert torch.equal(batch.to(torch.device("cuda")).images.cpu(), batch.images)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_sentence_arrives_unchanged_and_in_its_turn(num_workers):
    loader = BatchLoader(Samples(3), SamePaddedSizeSampler([(32, 32)] * 6, 2), num_workers)
    batches = iter(loader)
    assert next(batches).image_ids == [0, 1]
    with pytest.raises(DataError) as caught:
        next(batches)
    assert str(caught.value) == SENTENCE


def test_a_bug_keeps_its_traceback():
    with pytest.raises(KeyError):
        list(BatchLoader(Samples(0, KeyError), TrainingSampler(1, 1), num_workers=1))


# -- skipped images ----------------------------------------------------------------------------------------------------


def skipping(worker=0, num_workers=1, damaged=3, seed=1, processes=0):
    batch_size = 4 // num_workers
    sampler = TrainingSampler(6, batch_size, worker=worker, num_workers=num_workers, seed=seed, steps=6)
    return list(BatchLoader(Samples(damaged), sampler, processes, sampler.replacement))


@pytest.mark.parametrize("processes", [0, 1])
def test_a_skipped_image_is_replaced_and_told(processes):
    batches = skipping(processes=processes)
    assert [len(batch) for batch in batches] == [4] * 6
    assert not any(3 in batch.image_ids for batch in batches)
    told = [sentence for batch in batches for sentence in batch.skipped]
    assert len(told) >= 4 and set(told) == {SENTENCE}


def test_replacements_are_a_function_of_seed_step_and_entry():
    """Whatever the number of workers; only the places of the damaged image change."""
    alone = [batch.image_ids for batch in skipping()]
    halves = zip(skipping(0, 2), skipping(1, 2), strict=True)
    assert alone == [first.image_ids + second.image_ids for first, second in halves]
    whole = [batch.image_ids for batch in skipping(damaged=None)]
    pairs = [(a, b) for step, other in zip(whole, alone, strict=True) for a, b in zip(step, other, strict=True)]
    assert all(a == b or a == 3 for a, b in pairs) and len({b for a, b in pairs if a == 3}) > 1
    sampler, other = TrainingSampler(1000, 1, seed=1), TrainingSampler(1000, 1, seed=2)
    drawn = {
        sampler.replacement(Draw(3, 0), 0), sampler.replacement(Draw(3, 1), 0), sampler.replacement(Draw(4, 0), 0),
        sampler.replacement(Draw(3, 0), 1), other.replacement(Draw(3, 0), 0),
    }  # fmt: skip
    assert len({draw.entry for draw in drawn}) == 5


def test_where_nothing_can_be_read_skipping_ends():
    class Nothing(Samples):
        def __getitem__(self, index):
            raise DataError(SENTENCE)

    sampler = TrainingSampler(6, 1)
    with pytest.raises(DataError, match="image 3"):
        list(BatchLoader(Nothing(), sampler, replacement=sampler.replacement))


# -- loader processes --------------------------------------------------------------------------------------------------


class Slow(Samples):
    def __getitem__(self, index):
        time.sleep(0.2)
        return super().__getitem__(index)


def started(samples):
    """A loader that has given its first batch, and its process."""
    others = multiprocessing.active_children()
    batches = iter(BatchLoader(samples, SamePaddedSizeSampler([(32, 32)] * 40, 1), num_workers=1))
    next(batches)
    (process,) = set(multiprocessing.active_children()) - set(others)
    return batches, process


@pytest.mark.parametrize("while_waiting", [True, False])
def test_a_killed_loader_process_is_named_with_its_reason(while_waiting):
    batches, process = started(Slow())
    os.kill(process.pid, signal.SIGKILL)
    if not while_waiting:
        process.join(20)  # no error arises where nobody asks for a batch
    with pytest.raises(PlaceError, match=rf"died \(pid {process.pid}, killed by SIGKILL\).*dataset\.num_workers"):
        list(batches)


def test_a_loader_process_that_ends_by_itself_is_named():
    class Ends(Samples):
        def __getitem__(self, index):
            if index == 5:
                os._exit(7)
            return super().__getitem__(index)

    with pytest.raises(PlaceError, match="ended: 7"):
        list(started(Ends())[0])


@pytest.mark.slow
def test_signals_to_the_whole_group_leave_loader_processes_at_work():
    batches, process = started(Slow())
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGTERM)
    assert [next(batches).image_ids for _ in range(5)] == [[i] for i in range(1, 6)]
    process.join(SECONDS_AFTER_SIGTERM + 20)
    assert process.exitcode == -signal.SIGALRM


def test_the_handler_of_children_is_put_back():
    before = signal.getsignal(signal.SIGCHLD)
    batches, _ = started(Samples())
    assert signal.getsignal(signal.SIGCHLD) == before
    list(batches)
    assert signal.getsignal(signal.SIGCHLD) == before
