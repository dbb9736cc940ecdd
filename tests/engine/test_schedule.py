import json

import pytest

from upsnet.engine.schedule import learning_rate

# The numbers of the recipes (facts 2.2) from which the fixtures' rates follow.
RECIPES = {
    "resnet50_coco_16gpu": (0.02, 90000, (60000, 80000), 1500),
    "resnet101_dcn_coco_3x_16gpu": (0.02, 270000, (210000, 250000), 1500),
    "resnet50_cityscapes_16gpu": (0.02, 12000, (9000,), 1500),
    "resnet50_cityscapes_4gpu": (0.005, 48000, (36000,), 1500),
    "resnet101_cityscapes_w_coco_16gpu": (0.02, 3000, (2000,), 0),
}


@pytest.mark.parametrize("name", RECIPES)
def test_rates_of_the_original(shared, name):
    fixture = json.loads((shared("reference/oracle_fixtures") / f"optimizer_{name}.json").read_text())
    base, max_iteration, decays, warmup = RECIPES[name]
    for kind, key in (("step", "lr"), ("poly", "lr_if_poly")):
        for iteration, rate in fixture[key].items():
            assert learning_rate(int(iteration), base, max_iteration, decays, warmup, kind) == rate


def test_step_without_fixture():
    rates = [learning_rate(i, 1.0, 10, (4, 8), warmup=2) for i in range(10)]
    assert rates == pytest.approx([0.1, 0.55, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01])


def test_warmup_knows_no_decay():
    assert learning_rate(5, 1.0, 10, (4,), warmup=10) == pytest.approx(0.55)


def test_poly_falls_from_base_to_almost_nothing():
    rates = [learning_rate(i, 2.0, 100, kind="poly") for i in range(100)]
    assert rates[0] == 2.0 and rates[50] == pytest.approx(2 * 0.5**0.9) and 0 < rates[99] < 0.04
    assert rates == sorted(rates, reverse=True)
    warm = [learning_rate(i, 2.0, 100, warmup=10, kind="poly") for i in range(100)]
    assert warm[0] == pytest.approx(0.2) and warm[10:] == rates[10:]
    assert warm[:10] == pytest.approx([min(0.2 + 0.18 * i, rates[i]) for i in range(10)])
