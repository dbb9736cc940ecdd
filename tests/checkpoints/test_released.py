"""Released files: every entry of the seven key tables has its place, both ways, on paper and on disk."""

import json

import pytest
import torch

from tests.checkpoints.weights import small_network, small_recipe, write_table
from tests.models.test_checkpoint_keys import RECIPES, categories_of
from upsnet.builders import build_network
from upsnet.checkpoints.files import Kind, read_weights
from upsnet.checkpoints.loading import compare
from upsnet.checkpoints.released import our_name, released_name, to_released
from upsnet.config import load_recipe
from upsnet.structures.class_tables import class_table
from upsnet.structures.errors import WeightsError

COCO = class_table("coco")


def own_state(name):
    """The state of a recipe's network, without memory."""
    recipe = load_recipe(name)
    with torch.device("meta"):
        return build_network(recipe, categories_of(recipe)).state_dict()


@pytest.mark.parametrize("name", RECIPES)
def test_every_entry_has_its_place(name, shared):
    entries = json.loads(shared(f"reference/checkpoint_keys/{name}.json").read_text())["entries"]
    own = own_state(name)
    file = {our_name(key): (tuple(shape), dtype) for key, (shape, dtype) in entries.items()}
    assert file == {key: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for key, t in own.items()}
    assert [released_name(our_name(key)) for key in entries] == list(entries)
    assert [our_name(released_name(key)) for key in own] == list(own)


@pytest.mark.parametrize("prefix, counters", [("", True), ("module.", False)])
@pytest.mark.parametrize("name", RECIPES)
def test_files_of_every_table_fit_their_recipe(name, prefix, counters, shared, tmp_path):
    table = shared(f"reference/checkpoint_keys/{name}.json")
    file = read_weights(write_table(tmp_path / "w.pth", table, prefix, counters))
    assert file.kind is Kind.RELEASED and file.convention is None
    assert file.categories == class_table("coco" if "coco_" in name and "city" not in name else "Cityscapes")
    report = compare(own_state(name), file.state)
    assert report.differences() == ""
    back = to_released(file.state, "w.pth")
    assert {key: (list(t.shape), str(t.dtype)[6:]) for key, t in back.items()} == {
        key: (shape, dtype) for key, (shape, dtype) in json.loads(table.read_text())["entries"].items()
    }


@pytest.mark.parametrize("name", ["conv1.weight", "layer1.0.conv1.weight", "fpn.fpn_p5.0.weight", "rcnn.fc6.weight"])
def test_other_names_have_no_place(name):
    assert our_name(name) is None


@pytest.mark.parametrize("key", ["fpn_with_norm", "rcnn_with_norm", "fcn_with_norm", "backbone_with_norm"])
def test_layers_whose_released_names_are_not_known_are_refused(key):
    widths = [f"network.{width}_feature_dim=32" for width in ("fpn", "fcn", "rcnn", "mask")]
    network = small_network(small_recipe("upsnet_resnet50_coco_16gpu", f"network.{key}=group_norm", *widths), COCO)
    with pytest.raises(
        WeightsError, match=r"x.pth cannot be written under the released names: none is known for \w+\."
    ) as e:
        to_released(network.state_dict(), "x.pth")
    assert "norm" in str(e.value).split("known for ")[1]


def test_counts_of_no_released_file_tell_no_classes(shared, tmp_path):
    path = write_table(tmp_path / "w.pth", shared(f"reference/checkpoint_keys/{RECIPES[0]}.json"))
    state = torch.load(path, weights_only=True)
    state["rcnn.cls_score.bias"] = torch.zeros(7)
    torch.save(state, path)
    assert read_weights(path).categories is None


def test_unknown_names_stay_as_they_are(shared, tmp_path):
    path = write_table(tmp_path / "w.pth", shared(f"reference/checkpoint_keys/{RECIPES[0]}.json"))
    torch.save({**torch.load(path, weights_only=True), "extra.0.weight": torch.zeros(1)}, path)
    assert compare(own_state(RECIPES[0]), read_weights(path).state).differences() == "1 unknown here: extra.0.weight"
