import errno
import json
import logging
import re

import pytest

from upsnet.engine import log as log_module
from upsnet.engine.log import Means, TrainingLog, logging_to
from upsnet.structures.errors import PlaceError


def test_text_log_goes_to_file_and_console(tmp_path, capsys):
    logger = logging.getLogger("upsnet")
    before = logger.level, logger.propagate, list(logger.handlers)
    with logging_to(tmp_path / "deep" / "run.log"):
        logger.info("hello %d", 3)
        logger.debug("only in the file")
    written, shown = (tmp_path / "deep" / "run.log").read_text(), capsys.readouterr().err
    line = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \| test_log\.py \| line \d+: "
    assert re.fullmatch(rf"{line}hello 3\n{line}only in the file\n", written)
    assert re.fullmatch(rf"{line}hello 3\n", shown)
    assert (logger.level, logger.propagate, list(logger.handlers)) == before


def test_unwritable_places(tmp_path):
    (tmp_path / "file").write_text("")
    inside = tmp_path / "file" / "x"
    with pytest.raises(PlaceError, match="cannot write"), logging_to(inside):
        pass
    with pytest.raises(PlaceError, match="cannot write"):
        TrainingLog(inside)
    with pytest.raises(PlaceError, match="cannot write"):
        TrainingLog(tensorboard_folder=inside)


def test_full_disk_while_logging(tmp_path, monkeypatch, capsys):
    log = TrainingLog(tmp_path / "metrics.jsonl")

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(log_module, "open", fail, raising=False)
    with pytest.raises(PlaceError, match=r"metrics\.jsonl: No space left"):
        log.line({"iteration": 1})
    with logging_to(tmp_path / "run.log"):
        handler = logging.getLogger("upsnet").handlers[-1]
        monkeypatch.setattr(handler, "flush", fail)
        logging.getLogger("upsnet").info("still on the console")
        monkeypatch.undo()
    error = capsys.readouterr().err
    assert "still on the console" in error and "Traceback" not in error


def test_resume_drops_later_lines_and_a_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 5}\n{"iteration": 10}\n{"iteration": 15}\n{"itera')
    log = TrainingLog(path, begin_iteration=10)
    log.line({"iteration": 15, "total": 2.0})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"iteration": 5}, {"iteration": 10}, {"iteration": 15, "total": 2.0},
    ]  # fmt: skip
    TrainingLog(path)
    assert path.read_text() == ""


def test_a_kill_while_lines_are_dropped_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text(before := '{"iteration": 5}\n{"iteration": 10}\n')

    def killed(*_):
        assert path.read_text() == before
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        TrainingLog(path, begin_iteration=5)
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


def test_means_weigh_each_name_by_its_own_weights():
    means = Means()
    means.add({"a": 1.0, "b": 2.0}, 3)
    means.add({"a": 5.0}, 1)
    assert means.values() == {"a": 2.0, "b": 2.0}
