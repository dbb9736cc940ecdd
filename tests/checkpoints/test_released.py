"""Names of released files and ours: every entry of the seven tables, in both directions."""

import json

import pytest
import torch

from tests.models.test_checkpoint_keys import RECIPES, categories_of
from upsnet.builders import build_network
from upsnet.checkpoints.released import our_name, released_name
from upsnet.config import load_recipe


@pytest.mark.parametrize("name", RECIPES)
def test_every_entry_has_its_place(name, shared):
    entries = json.loads(shared(f"reference/checkpoint_keys/{name}.json").read_text())["entries"]
    recipe = load_recipe(name)
    with torch.device("meta"):
        own = build_network(recipe, categories_of(recipe)).state_dict()
    file = {our_name(key): (tuple(shape), dtype) for key, (shape, dtype) in entries.items()}
    assert file == {key: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for key, t in own.items()}
    assert [released_name(our_name(key)) for key in entries] == list(entries)
    assert [our_name(released_name(key)) for key in own] == list(own)


@pytest.mark.parametrize("name", ["conv1.weight", "layer1.0.conv1.weight", "fpn.fpn_p5.0.weight", "rcnn.fc6.weight"])
def test_other_names_have_no_place(name):
    assert our_name(name) is None


@pytest.mark.parametrize("name", ["fpn.lateral.0.norm.weight", "box_head.norm6.bias", "mask_head.convs.0.norm.weight"])
def test_layers_that_the_original_has_not(name):
    assert released_name(name) is None
