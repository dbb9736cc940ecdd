"""Downloads over lines and from servers that misbehave: whole and right, or not at all."""

import errno
import hashlib
import json
import os
import random
import socket

import pytest

from upsnet.checkpoints import transfer
from upsnet.checkpoints.manifest import Source
from upsnet.checkpoints.transfer import Patience, TransferError, any_answers, fetch, part_of
from upsnet.structures.errors import PlaceError

CONTENT = random.Random(0).randbytes(300_000)
QUICK = Patience(attempts=3, timeout=5.0, wait=0.0)


@pytest.fixture
def part(tmp_path):
    return tmp_path / "deep/file.pth.part"


def source(web, path="/file.pth", **known):
    return Source(web.url(path), **known)


def pinned(web, content=CONTENT):
    return source(web, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def ranges(page):
    return [headers.get("Range") for headers in page.asked]


def test_a_file_comes_whole(web, part):
    page = web.put("/file.pth", CONTENT)
    fetch(source(web), part, QUICK)
    assert part.read_bytes() == CONTENT and ranges(page) == [None]


@pytest.mark.parametrize("mark", [{"etag": '"v1"'}, {"last_modified": "Mon, 01 Jan 2024 00:00:00 GMT"}])
def test_a_cut_line_is_resumed_where_it_broke(web, part, mark):
    page = web.put("/file.pth", CONTENT, cuts=[100_000, 50_000, 1], **mark)
    fetch(source(web), part, QUICK)
    assert part.read_bytes() == CONTENT
    assert ranges(page) == [None, "bytes=100000-", "bytes=150000-", "bytes=150001-"]
    assert page.asked[1]["If-Range"] == next(iter(mark.values()))


def test_a_later_run_goes_on(web, part):
    page = web.put("/file.pth", CONTENT, etag='"v1"', cuts=[100_000], statuses=[])
    with pytest.raises(TransferError, match="cut the line after 100000 of 300000 bytes, 1 times"):
        fetch(source(web), part, Patience(attempts=1, wait=0))
    assert part.stat().st_size == 100_000
    fetch(source(web), part, QUICK)
    assert part.read_bytes() == CONTENT and ranges(page) == [None, "bytes=100000-"]


def test_a_whole_part_of_an_earlier_run_is_not_downloaded_again(web, part):
    page = web.put("/file.pth", CONTENT, etag='"v1"')
    fetch(source(web), part, QUICK)
    fetch(source(web), part, QUICK)
    assert len(page.asked) == 1


@pytest.mark.parametrize("after", ['"v2"', ""])
@pytest.mark.parametrize("heeds_the_condition", [True, False])
def test_parts_of_two_versions_are_never_joined(web, part, after, heeds_the_condition):
    """Also where the server ignores If-Range and sends the rest of the new version, of the same size."""

    def change(page):
        if len(page.asked) == 2:
            page.content, page.etag = CONTENT[::-1], after
            page.heeds_conditions = heeds_the_condition

    web.put("/file.pth", CONTENT, etag='"v1"', cuts=[100_000], move=change)
    fetch(source(web), part, QUICK)
    assert part.read_bytes() == CONTENT[::-1]


def test_a_changed_size_in_the_answer_starts_anew(web, part):
    longer = CONTENT + b"more"

    def change(page):
        page.content = longer if len(page.asked) > 1 else CONTENT

    web.put("/file.pth", CONTENT, etag='"same"', cuts=[1000], move=change)
    fetch(source(web), part, QUICK)
    assert part.read_bytes() == longer


def test_without_a_mark_of_the_version_a_download_starts_anew(web, part):
    page = web.put("/file.pth", CONTENT, cuts=[100_000])
    fetch(source(web), part, QUICK)
    assert part.read_bytes() == CONTENT and ranges(page) == [None, None]


def test_a_weak_etag_is_no_mark(web, part):
    page = web.put("/file.pth", CONTENT, etag='W/"v1"', cuts=[100_000])
    fetch(source(web), part, QUICK)
    assert part.read_bytes() == CONTENT and ranges(page) == [None, None]


def test_a_known_checksum_will_do_instead_of_a_mark(web, part):
    page = web.put("/file.pth", CONTENT, cuts=[100_000])
    fetch(pinned(web), part, QUICK)
    assert part.read_bytes() == CONTENT and ranges(page) == [None, "bytes=100000-"]


def test_a_server_that_ignores_range_sends_all_again(web, part):
    page = web.put("/file.pth", CONTENT, etag='"v1"', ranges=False, cuts=[100_000])
    fetch(source(web), part, QUICK)
    assert part.read_bytes() == CONTENT and len(page.asked) == 2


def test_a_part_of_another_address_is_not_continued(web, part):
    web.put("/first.pth", CONTENT[::-1], etag='"v1"', cuts=[100_000])
    page = web.put("/file.pth", CONTENT, etag='"v1"')
    with pytest.raises(TransferError):
        fetch(source(web, "/first.pth"), part, Patience(attempts=1))
    fetch(source(web), part, QUICK)
    assert part.read_bytes() == CONTENT and ranges(page) == [None]


@pytest.mark.parametrize("kept", ["", "{", "[]", '{"url": 1}'])
def test_a_part_of_unknown_origin_is_not_continued(web, part, kept):
    page = web.put("/file.pth", CONTENT, etag='"v1"')
    part.parent.mkdir()
    part.write_bytes(b"from somewhere")
    if kept:
        part.with_name(part.name + ".json").write_text(kept)
    fetch(source(web), part, QUICK)
    assert part.read_bytes() == CONTENT and ranges(page) == [None]


def test_a_part_that_is_too_long_starts_anew(web, part):
    page = web.put("/file.pth", CONTENT, etag='"v1"', cuts=[10])
    with pytest.raises(TransferError):
        fetch(source(web), part, Patience(attempts=1))
    part.write_bytes(CONTENT + b"too long")
    fetch(source(web), part, QUICK)
    assert part.read_bytes() == CONTENT and ranges(page) == [None, "bytes=300008-", None]


def test_a_busy_server_is_asked_again(web, part):
    page = web.put("/file.pth", CONTENT, statuses=[503, 429])
    fetch(source(web), part, QUICK)
    assert part.read_bytes() == CONTENT and len(page.asked) == 3


def test_patience_ends_when_nothing_more_comes(web, part):
    page = web.put("/file.pth", CONTENT, etag='"v1"', cuts=[1000, 0, 0, 0, 0])
    with pytest.raises(TransferError, match="3 times in a row"):
        fetch(source(web), part, QUICK)
    assert len(page.asked) == 3, "the first answer brought something, two more attempts nothing"


def test_patience_ends_where_every_attempt_starts_anew(web, part):
    page = web.put("/file.pth", CONTENT, cuts=[1000, 900, 1000, 800])
    with pytest.raises(TransferError, match="3 times in a row"):
        fetch(source(web), part, QUICK)
    assert len(page.asked) == 3


def test_waits_grow(web, part, monkeypatch):
    waited = []
    monkeypatch.setattr(transfer.time, "sleep", waited.append)
    web.put("/file.pth", CONTENT, statuses=[500] * 4)
    with pytest.raises(TransferError, match="HTTP 500, 4 times"):
        fetch(source(web), part, Patience(attempts=4, wait=0.5))
    assert waited == [0.5, 1.0, 2.0]


def test_a_line_that_stalls_is_given_up_and_resumed(web, part):
    page = web.put("/file.pth", CONTENT, etag='"v1"', stall=1)
    fetch(source(web), part, Patience(timeout=0.2, wait=0))
    assert part.read_bytes() == CONTENT and ranges(page) == [None, "bytes=150000-"]


@pytest.mark.parametrize("status", [404, 403, 410])
def test_a_refusal_is_not_repeated(web, part, status):
    page = web.put("/file.pth", CONTENT, statuses=[status] * 3)
    with pytest.raises(TransferError, match=f"HTTP {status}"):
        fetch(source(web), part, QUICK)
    assert len(page.asked) == 1 and not part.exists()


@pytest.mark.parametrize(
    "body, content_type",
    [
        (b"<!DOCTYPE html><title>Sign in</title>", "text/html; charset=utf-8"),
        (b"\n <HTML>gone</HTML>", "application/octet-stream"),
        (b"<?xml version='1.0'?><Error/>", ""),
        (b"Not a file", "text/html"),
    ],
)
def test_a_web_page_with_status_200_is_no_file(web, part, body, content_type):
    web.put("/file.pth", body, content_type=content_type)
    with pytest.raises(TransferError, match="a web page instead of the file"):
        fetch(source(web), part, QUICK)
    assert not part.exists()


def test_a_page_does_not_cost_what_is_there(web, part):
    page = web.put("/file.pth", CONTENT, etag='"v1"', cuts=[1000])
    with pytest.raises(TransferError):
        fetch(source(web), part, Patience(attempts=1))
    web.put("/file.pth", b"<html>try later</html>", content_type="text/html")
    with pytest.raises(TransferError, match="web page"):
        fetch(source(web), part, QUICK)
    web.pages["/file.pth"] = page
    fetch(source(web), part, QUICK)
    assert part.read_bytes() == CONTENT and ranges(page) == [None, "bytes=1000-"]


@pytest.mark.parametrize("length", [299_999, 300_001])
def test_another_size_is_refused_before_it_is_downloaded(web, part, length):
    web.put("/file.pth", bytes(length))
    with pytest.raises(TransferError, match=f"{length} bytes instead of 300000"):
        fetch(pinned(web), part, QUICK)
    assert not part.exists()


def test_bytes_beyond_the_stated_length_are_left_on_the_line(web, part):
    page = web.put("/file.pth", CONTENT)
    content_length = str(len(CONTENT))

    def more(page):
        page.content, page.states_length = CONTENT + b"junk", False
        page.content_type = f"application/octet-stream\r\nContent-Length: {content_length}"

    page.move = more
    fetch(source(web), part, QUICK)
    assert part.read_bytes() == CONTENT


def test_an_endless_answer_is_cut_off(web, part, monkeypatch):
    monkeypatch.setattr(transfer, "LARGEST", 200_000)
    monkeypatch.setattr(transfer, "CHUNK", 1000)
    web.put("/file.pth", CONTENT, states_length=False)
    with pytest.raises(TransferError, match="more than 200000 bytes"):
        fetch(source(web), part, QUICK)
    assert not part.exists()


def test_redirects_are_followed_with_the_range(web, part):
    web.put("/old.pth", b"", redirect="/file.pth")
    page = web.put("/file.pth", CONTENT, etag='"v1"', cuts=[1000])
    fetch(source(web, "/old.pth"), part, QUICK)
    assert part.read_bytes() == CONTENT and ranges(page) == [None, "bytes=1000-"]


def test_redirects_in_a_circle_end(web, part):
    web.put("/file.pth", b"", redirect="/file.pth")
    with pytest.raises(TransferError, match="HTTP 302"):
        fetch(source(web), part, QUICK)


def closed_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.mark.parametrize(
    "url, why",
    [
        ("http://127.0.0.1:{}/file.pth", "refused"),
        ("nonsense", "is no address"),
        ("nonsense://host/file.pth", "unknown url type"),
    ],
)
def test_no_server(part, url, why):
    with pytest.raises(TransferError, match=why):
        fetch(Source(url.format(closed_port())), part, QUICK)


def test_an_unknown_host(part, monkeypatch):
    def unknown(*arguments, **named):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(TransferError, match="the host is not found"):
        fetch(Source("http://host.invalid/file.pth"), part, QUICK)


def test_a_short_outage_is_waited_for(web, part, monkeypatch):
    """Not finding the host is final before anything came, and worth waiting afterwards."""
    page = web.put("/file.pth", CONTENT, etag='"v1"', cuts=[1000])
    connect, calls = socket.create_connection, []

    def failing(*arguments, **named):
        calls.append(arguments)
        if len(calls) == 2:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return connect(*arguments, **named)

    monkeypatch.setattr(socket, "create_connection", failing)
    fetch(source(web), part, QUICK)
    assert part.read_bytes() == CONTENT and len(calls) == 3 and ranges(page) == [None, "bytes=1000-"]


def test_a_server_that_never_answers_is_left_after_one_attempt(part, monkeypatch):
    monkeypatch.setattr(transfer.time, "sleep", lambda seconds: pytest.fail("waits for another attempt"))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(TransferError, match="no answer in time"):
            fetch(Source(f"http://127.0.0.1:{silent.getsockname()[1]}/file"), part, Patience(timeout=0.1))


def test_a_full_disk_is_no_fault_of_the_line(web, part, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(transfer.os, "fsync", full)
    page = web.put("/file.pth", CONTENT)
    with pytest.raises(PlaceError, match="No space left"):
        fetch(source(web), part, QUICK)
    assert len(page.asked) == 1


def test_answers(web):
    dead = f"http://127.0.0.1:{closed_port()}/file"
    assert any_answers([dead, web.url("/missing")], 5), "404 is an answer"
    assert not any_answers([dead, "nonsense"], 5)
    assert not any_answers([], 5)


def test_a_silent_host_does_not_hold_the_probe_up():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert not any_answers([f"http://127.0.0.1:{silent.getsockname()[1]}/file"], 0.2)


def test_parts_bear_the_sources_name(tmp_path):
    where = Source("https://host.example/a/resnet50-0676ba61.pth?download=1")
    assert part_of(tmp_path / "resnet-50.pth", where) == tmp_path / "resnet50-0676ba61.pth.part"


def test_what_is_kept_of_a_part_is_readable(web, part):
    web.put("/file.pth", CONTENT, etag='"v1"', cuts=[10])
    with pytest.raises(TransferError):
        fetch(source(web), part, Patience(attempts=1))
    kept = json.loads(part.with_name("file.pth.part.json").read_text())
    assert kept == {"url": web.url("/file.pth"), "validator": '"v1"', "total": len(CONTENT)}
