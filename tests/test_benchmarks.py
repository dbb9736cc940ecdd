"""The command line of the benchmarks refuses in one sentence what it cannot run."""

import pytest
import torch

from benchmarks.memory import Alive, Storages
from benchmarks.operators import parser_of

WRONG = {
    "--rounds=0": "argument --rounds: '0' is no whole number from 1 on",
    "--rounds=-1": "argument --rounds: '-1' is no whole number from 1 on",
    "--rounds=many": "argument --rounds: 'many' is no whole number from 1 on",
    "--device=cuda": "argument --device: torch sees no CUDA device here",
    "--device=tpu": "argument --device: invalid choice: 'tpu'",
}


@pytest.mark.parametrize("option", WRONG)
def test_what_cannot_be_run_is_refused(option, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        parser_of("A benchmark.", rounds=5).parse_args([option])
    assert stopped.value.code == 2 and WRONG[option] in capsys.readouterr().err


def test_a_gpu_that_is_there_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = parser_of("A benchmark.", rounds=5).parse_args(["--device", "cuda"])
    assert (options.device, options.rounds, options.out) == ("cuda", 5, None)


def test_memory_is_counted_once_and_given_back():
    """Against sizes that are known: views share their storage, and what is let go counts no more."""
    storages = Storages()
    with Alive(storages):
        first = torch.ones(1 << 18)
        view = first[10:].view(-1)
        second = first + 1
        assert storages.now == storages.peak == 2 << 20
        del second
        assert storages.now == 1 << 20
        third = view * 2
        del first
        assert storages.now == (2 << 20) - 40 and storages.peak == 2 << 20  # the view holds all of it
        del view, third
    assert (storages.now, storages.peak) == (0, 2 << 20)
