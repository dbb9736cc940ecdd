"""What goes wrong in a loader process arrives as it was raised."""

import pytest
import torch
from torch.utils.data import Dataset

from upsnet.dataset.batches import Draw, SamePaddedSizeSampler, TrainingSampler
from upsnet.dataset.loading import BatchLoader
from upsnet.structures.errors import DataError
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
