"""From COCO's classes to those of Cityscapes, row by row; numbers as the original's loader has them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.checkpoints.weights import small_network, small_recipe
from upsnet.checkpoints.class_rows import cityscapes_rows
from upsnet.checkpoints.files import read_weights
from upsnet.checkpoints.loading import load_pretrained
from upsnet.structures.categories import Categories, Category
from upsnet.structures.class_tables import class_table

COCO, CITYSCAPES = class_table("coco"), class_table("Cityscapes")

THINGS = {0: 0, 1: 1, 2: None, 3: 3, 4: 8, 5: 6, 6: 7, 7: 4, 8: 2}
SEMANTIC = {
    0: 20, 1: 43, 2: 49, 3: 51, 4: 37, 5: None, 6: 62, 7: None, 8: 36, 9: None, 10: 39,
    11: 53, 12: None, 13: 55, 14: 60, 15: 58, 16: 59, 17: 56, 18: 54,
}  # fmt: skip
LAYERS = {
    "box_head.class_logits": (THINGS, 1),
    "box_head.deltas": (THINGS, 4),
    "mask_head.score": (THINGS, 1),
    "semantic_head.score": (SEMANTIC, 1),
}
CITY_RECIPE = "upsnet_resnet50_cityscapes_16gpu"


@pytest.fixture(scope="module")
def coco_file(tmp_path_factory):
    """Trained on COCO, as the released file for Cityscapes: no global average, two semantic layers."""
    recipe = small_recipe("upsnet_resnet50_coco_16gpu", "network.fpn_with_gap=false", "network.fcn_num_layers=2")
    path = tmp_path_factory.mktemp("weights") / "coco.pth"
    weights = small_network(recipe, COCO).state_dict()
    torch.save({"weights": weights, "categories": COCO.to_coco(), "recipe": "", "format_version": 1}, path)
    return read_weights(path)


def start(file, categories=CITYSCAPES, seed=7):
    network = small_network(small_recipe(CITY_RECIPE), categories, seed=1)
    return network.state_dict(), load_pretrained(network, file, categories, seed)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_every_row_of_both_tables(coco_file, layer, kind):
    rows, size = LAYERS[layer]
    name = f"{layer}.{kind}"
    source, taken = coco_file.state[name], start(coco_file)[0][name]
    assert len(taken) == size * len(rows)
    for ours, theirs in rows.items():
        block = taken[size * ours : size * (ours + 1)]
        if theirs is not None:
            assert torch.equal(block, source[size * theirs : size * (theirs + 1)]), ours
        else:
            assert not torch.isin(block, source).any(), ours


def test_random_rows_have_the_mean_and_deviation_of_the_whole_tensor(coco_file):
    coco_file.state["semantic_head.score.weight"].mul_(3).add_(5)
    coco_file.state["box_head.deltas.weight"].mul_(0.01).sub_(2)
    draws = {"semantic_head.score.weight": [], "box_head.deltas.weight": []}
    for seed in range(20):
        taken = cityscapes_rows(coco_file, CITYSCAPES, seed).tensors
        draws["semantic_head.score.weight"].append(taken["semantic_head.score.weight"][[5, 7, 9, 12]].numpy())
        draws["box_head.deltas.weight"].append(taken["box_head.deltas.weight"][8:12].numpy())
    for name, drawn in draws.items():
        source, values = coco_file.state[name].numpy(), np.stack(drawn)
        assert values.mean() == pytest.approx(source.mean(), abs=5 * source.std() / np.sqrt(values.size))
        assert values.std() == pytest.approx(source.std(), rel=0.1)
        assert len(np.unique(values)) > 0.98 * values.size  # rows and seeds share no draws


def test_the_seed_decides(coco_file):
    first, same, other = (cityscapes_rows(coco_file, CITYSCAPES, seed).tensors for seed in (1, 1, 2))
    name = "semantic_head.score.weight"
    assert torch.equal(first[name], same[name])
    differs = (first[name] != other[name]).flatten(1).any(dim=1)
    assert torch.nonzero(differs).flatten().tolist() == [5, 7, 9, 12]


def test_tensors_share_no_draws(coco_file):
    taken = cityscapes_rows(coco_file, CITYSCAPES, 1).tensors
    names = ("box_head.class_logits.weight", "mask_head.score.weight")
    drawn = torch.stack([taken[name][2].flatten() for name in names])
    assert torch.corrcoef(drawn)[0, 1] < 0.99


def test_the_report_says_so(coco_file):
    report = start(coco_file)[1]
    assert report.drawn_classes == ["pole", "traffic sign", "terrain", "rider"]
    assert report.left_out == report.initialised == []
    assert report.lines() == [
        "loaded: backbone (120), fpn (16), rpn (6), box_head (8), mask_head (12), semantic_head (10)",
        "class rows: from COCO's nearest classes, random for pole, traffic sign, terrain, rider",
    ]


def test_the_file_itself_stays(coco_file):
    before = coco_file.state["box_head.deltas.weight"].clone()
    start(coco_file)
    assert torch.equal(coco_file.state["box_head.deltas.weight"], before)


def test_other_classes_are_not_mapped(coco_file):
    others = Categories(Category(i, f"class {i}", i > 10, (0, 0, 0)) for i in range(19))
    report = start(coco_file, others)[1]
    assert report.drawn_classes is None
    assert report.other_shape["box_head.deltas.weight"] == ((324, 8), (36, 8))
    assert report.lines() == [
        "loaded: backbone (120), fpn (16), rpn (6), box_head (4), mask_head (10), semantic_head.layers (8)",
        "of another size, so initialised anew: box_head.class_logits.weight (81×8 → 9×8), "
        "box_head.class_logits.bias (81 → 9), box_head.deltas.weight (324×8 → 36×8), box_head.deltas.bias (324 → 36), "
        "mask_head.score.weight (81×8×1×1 → 9×8×1×1), mask_head.score.bias (81 → 9), "
        "semantic_head.score.weight (133×32×1×1 → 19×32×1×1), semantic_head.score.bias (133 → 19)",
    ]


def test_a_file_that_contradicts_its_class_table_is_not_mapped(coco_file):
    state = {**coco_file.state, "box_head.class_logits.bias": torch.zeros(80)}
    assert cityscapes_rows(replace(coco_file, state=state), CITYSCAPES, 0) is None
    assert cityscapes_rows(replace(coco_file, state={}), CITYSCAPES, 0) is None
