import json

import pytest

from upsnet.dataset import json_records
from upsnet.dataset.json_records import records_of
from upsnet.structures.errors import DataError

CONTENT = {
    "info": {"year": 2017, "text": 'brackets ] } and "quotes" \\ and ü'},
    "count": 123456789012,
    "images": [{"id": i, "file_name": f"{i}.jpg", "nested": [[1.5, -2e3], []]} for i in range(50)],
    "empty": [],
    "numbers": [1, 22, 333],
    "annotations": [{"id": 7, "segmentation": {"counts": [1, 2, 3]}}],
    "last": None,
}


def collect(path):
    found = {}
    for key, value in records_of(path):
        found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 22])
@pytest.mark.parametrize("indent", [None, 2])
def test_the_same_as_json_load_wherever_the_window_ends(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(json_records, "_CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(CONTENT, indent=indent, ensure_ascii=False), encoding="utf-8")
    expected = {k: v if isinstance(v, list) else [v] for k, v in CONTENT.items() if v != []}
    assert collect(path) == expected


def test_a_large_file_shows_its_progress(tmp_path, monkeypatch, capsys):
    path = tmp_path / "large.json"
    path.write_text(json.dumps(CONTENT))
    collect(path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(json_records, "_LARGE", 0)
    collect(path)
    assert "large.json" in capsys.readouterr().err


def test_an_empty_object(tmp_path):
    (tmp_path / "a.json").write_text(" { } ")
    assert collect(tmp_path / "a.json") == {}


WHOLE = json.dumps(CONTENT)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2]",
        "hello",
        '{"a" 1}',
        '{"a": [1 2]}',
        '{"a": [1,]}',
        *(WHOLE[: len(WHOLE) * i // 9] for i in range(9)),
        WHOLE + WHOLE,  # what a download leaves that was resumed at the wrong place
        "{} x",
    ],
)
def test_broken_files_are_refused_by_name(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"broken\.json: is not a valid json file"):
        collect(path)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "broken.json"
    path.write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(DataError, match=r"broken\.json"):
        collect(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"none\.json: cannot be read"):
        collect(tmp_path / "none.json")
