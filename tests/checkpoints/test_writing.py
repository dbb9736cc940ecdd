"""Weights written for others come back as they were, under any names and in any container."""

import json

import pytest
import safetensors
import torch

from tests.checkpoints.weights import small_network, small_recipe
from upsnet.checkpoints.files import Kind, read_weights
from upsnet.checkpoints.released import our_name
from upsnet.checkpoints.writing import default_place, write_weights
from upsnet.structures.class_tables import class_table
from upsnet.structures.errors import PlaceError, WeightsError

CITYSCAPES = class_table("Cityscapes")


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    network = small_network(small_recipe("upsnet_resnet50_cityscapes_16gpu"), CITYSCAPES)
    path = tmp_path_factory.mktemp("weights") / "city_7.pth"
    record = {"weights": network.state_dict(), "categories": CITYSCAPES.to_coco(), "recipe": "seed: 1\n"}
    torch.save({**record, "iteration": 7, "format_version": 1}, path)
    return read_weights(path)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def test_original(snapshot, tmp_path):
    out = tmp_path / "new" / "o.pth"
    write_weights(snapshot, "original", out)
    stored = torch.load(out, weights_only=True)
    assert {our_name(name) for name in stored} == snapshot.state.keys() and not snapshot.state.keys() & stored.keys()
    assert out.read_bytes()[:2] == b"\x80\x02", "torch of 2018 cannot read the newer format"
    read = read_weights(out)
    assert read.kind is Kind.RELEASED and read.format == "torch before 1.6"
    assert same(read.state, snapshot.state) and read.categories == CITYSCAPES and read.recipe is None
    assert [path.name for path in out.parent.iterdir()] == ["o.pth"]


def test_safetensors(snapshot, tmp_path):
    out = tmp_path / "o.safetensors"
    write_weights(snapshot, "safetensors", out)
    read = read_weights(out)
    assert read.kind is Kind.OURS and read.format == "safetensors" and same(read.state, snapshot.state)
    assert (read.categories, read.recipe, read.iteration) == (CITYSCAPES, "seed: 1\n", 7)
    with safetensors.safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["upsnet"])["format_version"] == 1


def test_round_trip_through_both(snapshot, tmp_path):
    write_weights(snapshot, "original", tmp_path / "a.pth")
    write_weights(read_weights(tmp_path / "a.pth"), "safetensors", tmp_path / "b.safetensors")
    write_weights(read_weights(tmp_path / "b.safetensors"), "original", tmp_path / "c.pth")
    first, last = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pth", "c.pth"))
    assert same(first, last)
    assert same(read_weights(tmp_path / "c.pth").state, snapshot.state)


def test_counters_that_old_files_lack_are_added(snapshot, tmp_path):
    bare = {name: tensor for name, tensor in snapshot.state.items() if "num_batches" not in name}
    torch.save(bare, tmp_path / "w.pth")
    write_weights(read_weights(tmp_path / "w.pth"), "original", tmp_path / "o.pth")
    assert same(read_weights(tmp_path / "o.pth").state, snapshot.state)


def test_bare_weights_of_ours_know_no_classes(snapshot, tmp_path):
    torch.save(snapshot.state, tmp_path / "w.pth")
    file = read_weights(tmp_path / "w.pth")
    assert file.kind is Kind.OURS and file.categories is None
    write_weights(file, "safetensors", tmp_path / "o.safetensors")
    assert read_weights(tmp_path / "o.safetensors").categories is None


@pytest.mark.parametrize("way", ["same", "dots", "link"])
def test_never_over_the_input(snapshot, way):
    path, before = snapshot.path, snapshot.path.read_bytes()
    out = {"same": path, "dots": path.parent / "x" / ".." / path.name, "link": path.parent / "link.pth"}[way]
    if way == "link":
        out.symlink_to(path)
    with pytest.raises(PlaceError, match="give another --out"):
        write_weights(snapshot, "original", out)
    assert path.read_bytes() == before


def test_what_is_no_upsnet_is_refused(tmp_path):
    resnet = {"conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)}
    for name, state, what in (("r", resnet, "a ResNet alone"), ("x", {"a.weight": torch.zeros(1)}, "no UPSNet")):
        torch.save(state, tmp_path / f"{name}.pth")
        with pytest.raises(WeightsError, match=what):
            write_weights(read_weights(tmp_path / f"{name}.pth"), "original", tmp_path / "o.pth")
    assert not (tmp_path / "o.pth").exists()


def test_a_place_that_cannot_be_written(snapshot, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PlaceError, match="cannot write"):
        write_weights(snapshot, "original", tmp_path / "file" / "o.pth")


def test_default_places(tmp_path):
    assert default_place(tmp_path / "a.b.pth", "original") == tmp_path / "a.b_original.pth"
    assert default_place(tmp_path / "a.b.pth", "safetensors") == tmp_path / "a.b.safetensors"
