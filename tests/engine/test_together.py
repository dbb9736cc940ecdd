import logging
import pickle

import pytest

from tests.engine.thread_workers import together
from upsnet.engine.together import Together
from upsnet.engine.workers import SingleWorker
from upsnet.structures.errors import DataError, PlaceError


def test_values_of_all():
    assert together(2, lambda workers: Together(workers).exchange(workers.rank)) == [[0, 1]] * 2


@pytest.mark.parametrize("at_fault", [0, 1])
def test_an_error_of_one_ends_all_in_one_sentence(at_fault, caplog):
    caplog.set_level(logging.ERROR, logger="upsnet")

    def work(workers):
        exchanges = Together(workers)
        with exchanges.keeping():
            if workers.rank == at_fault:
                raise DataError("image 3 is cut off")
        with exchanges.keeping():
            raise PlaceError("a later one")
        with pytest.raises(DataError if at_fault == 0 else (DataError, PlaceError)) as caught:
            exchanges.exchange(None)
        return caught.value

    first, second = together(2, work)
    assert type(first) is type(second) and str(first) == str(second) and first.told and second.told
    assert caplog.messages == [str(first)]


def test_one_worker_alone_raises_what_it_has_met_and_leaves_the_telling():
    exchanges = Together(SingleWorker())
    with exchanges.keeping():
        raise DataError("image 3 is cut off")
    with pytest.raises(DataError, match="image 3") as caught:
        exchanges.exchange(None)
    assert not caught.value.told


def test_a_bug_is_not_kept():
    with pytest.raises(KeyError), Together(SingleWorker()).keeping():
        raise KeyError("bug")


def test_errors_travel_between_processes():
    error = DataError("image 3")
    error.told = True
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == "image 3" and again.told and type(again) is DataError
