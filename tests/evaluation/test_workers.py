import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from upsnet.evaluation import workers
from upsnet.evaluation.workers import default_workers, map_in_order
from upsnet.structures.errors import DataError, PlaceError

ROOT = Path(__file__).parents[2]


def slow_first(item):
    time.sleep(0.2 if item == 0 else 0)
    return item * item, os.getpid()


def refuse_from_seven(item):
    if item >= 7:
        time.sleep(0.1 if item == 7 else 0)
        raise DataError(f"item {item} is wrong")
    return item


def kill_itself(item):
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_keep_the_order_of_the_items(count):
    found = list(map_in_order(slow_first, range(40), count))
    assert [square for square, _ in found] == [item * item for item in range(40)]
    processes = {process for _, process in found}
    assert processes == {os.getpid()} if count == 1 else os.getpid() not in processes
    assert multiprocessing.active_children() == []


def test_nothing_to_do():
    assert list(map_in_order(slow_first, [], 3)) == []


@pytest.mark.parametrize("count", [1, 3])
def test_the_first_error_in_the_order_of_the_items_is_raised(count):
    seen = []
    with pytest.raises(DataError, match=r"^item 7 is wrong$"):
        for item in map_in_order(refuse_from_seven, range(100), count):
            seen.append(item)
    assert seen == list(range(7)) and multiprocessing.active_children() == []


def test_a_killed_worker_is_one_sentence():
    with pytest.raises(PlaceError, match="a worker process was killed"):
        list(map_in_order(kill_itself, range(10), 2))
    assert multiprocessing.active_children() == []


def test_no_workers_are_refused():
    with pytest.raises(PlaceError, match="ask for at least 1"):
        list(map_in_order(slow_first, [1], 0))


def test_few_items_need_few_workers(monkeypatch):
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert [default_workers(count) for count in (0, 1, 99, 100, 5000)] == [1, 1, 1, 2, 8]


def test_only_a_few_results_lie_in_memory(monkeypatch):
    """A consumer that stops early leaves the rest undone."""
    given = []

    class Counted(list):
        def __iter__(self):
            for item in super().__iter__():
                given.append(item)
                yield item

    results = map_in_order(slow_first, Counted(range(1000)), 2)
    assert next(results)[0] == 0
    assert len(given) <= 2 * workers.AHEAD
    results.close()
    assert multiprocessing.active_children() == []


def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = """
        import pathlib, sys, time, os
        from upsnet.evaluation.workers import map_in_order
        def note(item):
            pathlib.Path(sys.argv[1], str(os.getpid())).touch()
            time.sleep(0.05)
        list(map_in_order(note, range(10000), 2))
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], cwd=ROOT)
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    parent.kill()
    parent.wait()
    children = [int(path.name) for path in tmp_path.iterdir()]
    wait_until(lambda: not any(is_alive(child) for child in children))


def wait_until(done):
    for _ in range(600):
        if done():
            return
        time.sleep(0.05)
    raise AssertionError("waited for 30 s")


def is_alive(process):
    """A zombie that nobody has reaped is dead."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
