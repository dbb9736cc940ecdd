import json

import pytest
import torch
from torch import nn

from tests.reference.optimizer import SlowCaffeSGD
from upsnet.builders import build_optimizer_of
from upsnet.config import load_recipe
from upsnet.engine.optimizer import CaffeSGD, build_optimizer, parameter_groups, set_learning_rate

TRACES = [
    "resnet50_coco_16gpu", "resnet101_dcn_coco_3x_16gpu", "resnet50_cityscapes_16gpu", "resnet50_cityscapes_4gpu",
    "resnet101_cityscapes_w_coco_16gpu",
]  # fmt: skip


@pytest.mark.parametrize("name", TRACES)
def test_trace_of_the_original(shared, name):
    fixture = json.loads((shared("reference/oracle_fixtures") / f"optimizer_{name}.json").read_text())
    start, *steps = fixture["sgd_trace"]
    w, b = (nn.Parameter(torch.tensor(start[key])) for key in "wb")
    module = nn.Module()
    module.weight, module.bias = w, b
    recipe = load_recipe(f"upsnet_{name}")
    assert (recipe.train.momentum, recipe.train.wd) == (fixture["momentum"], fixture["wd"])
    optimizer = build_optimizer_of(recipe, module)
    for step in steps:
        w.grad, b.grad = torch.tensor(step["grad_w"]), torch.tensor(step["grad_b"])
        set_learning_rate(optimizer, step["lr"])
        optimizer.step()
        if step["buffers_divided_by_10_after"]:
            optimizer.divide_momentum(10)
        for parameter, key in ((w, "w"), (b, "b")):
            torch.testing.assert_close(parameter.data, torch.tensor(step[key]), rtol=0, atol=1e-6)
            buffer = optimizer.state[parameter]["momentum_buffer"]
            torch.testing.assert_close(buffer, torch.tensor(step[f"buf_{key}"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "factor"), [("sgd", 2.0), ("adamw", 1.0)])
def test_only_sgd_moves_biases_at_twice_the_rate(kind, factor):
    optimizer = build_optimizer(nn.Linear(2, 2), kind)
    set_learning_rate(optimizer, 0.1)
    assert {group["kind"]: group["lr"] for group in optimizer.param_groups} == {"weight": 0.1, "bias": 0.1 * factor}


def test_groups_go_by_kind():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.Conv2d(4, 4, 1, bias=False),
        nn.ConvTranspose2d(4, 4, 2),
    )  # fmt: skip
    network[4].requires_grad_(False)
    groups = {group["kind"]: group for group in parameter_groups(network, 0.5, bias_factor=2.0)}
    ids = {kind: [id(p) for p in group["params"]] for kind, group in groups.items()}
    assert ids == {
        "norm": [id(p) for layer in network[1:4] for p in (layer.weight, layer.bias)],
        "weight": [id(network[0].weight), id(network[5].weight)],
        "bias": [id(network[0].bias), id(network[5].bias)],
    }
    assert {k: (g["factor"], g["weight_decay"]) for k, g in groups.items()} == {
        "norm": (1, 0), "weight": (1, 0.5), "bias": (2, 0),
    }  # fmt: skip


def test_a_shared_parameter_is_in_one_group_once():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    groups = parameter_groups(nn.Sequential(first, second), 0.1, 2.0)
    assert sorted(len(group["params"]) for group in groups) == [1, 2]


def test_adamw_has_the_same_groups_with_equal_rates():
    optimizer = build_optimizer(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "adamw", weight_decay=0.3)
    set_learning_rate(optimizer, 0.01)
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]
    assert [(g["kind"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("norm", 0.01, 0), ("weight", 0.01, 0.3), ("bias", 0.01, 0),
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_like_its_twin(seed):
    """Random shapes, among them empty and scalar ones; missing gradients; huge and tiny gradients; changing rates."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 3, 2), (), (0,), (1,), (65,), (7, 1)]
    factors, decays = [1.0, 2.0] * 3, [0.01, 0.0, 0.0] * 2
    parameters = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]
    groups = [
        {"params": [p], "factor": f, "weight_decay": d} for p, f, d in zip(parameters, factors, decays, strict=True)
    ]
    fast = CaffeSGD(groups, momentum=0.9)
    slow = SlowCaffeSGD([p.detach().flatten().tolist() for p in parameters], factors, decays, 0.9)
    for step in range(12):
        rate = [0.1, 0.0, 1e-3][step % 3]
        for i, parameter in enumerate(parameters):
            size = [1.0, 1e6, 1e-12][(step + i) % 3]
            grad = size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = None if (step + i) % 5 == 0 else grad
        set_learning_rate(fast, rate)
        fast.step()
        slow.step([None if p.grad is None else p.grad.flatten().tolist() for p in parameters], rate)
        if step % 4 == 3:
            fast.divide_momentum(10)
            slow.divide_momentum(10)
        for parameter, weights in zip(parameters, slow.weights, strict=True):
            torch.testing.assert_close(
                parameter.detach().flatten(), torch.tensor(weights, dtype=torch.float64), rtol=1e-12, atol=1e-12
            )


def test_dividing_before_the_first_step_does_nothing():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = CaffeSGD([parameter])
    optimizer.divide_momentum(10)
    assert not optimizer.state and parameter.tolist() == [1, 1]
