import json
from dataclasses import replace

import pytest

from tests.engine.test_optimizer import TRACES
from upsnet.builders import engine_options
from upsnet.config import load_recipe
from upsnet.engine.schedule import learning_rate


@pytest.mark.parametrize("name", TRACES)
def test_rates_of_the_original(shared, name):
    """From the recipe to the rate that the loop sets: equal to the last bit."""
    fixture = json.loads((shared("reference/oracle_fixtures") / f"optimizer_{name}.json").read_text())
    options = engine_options(load_recipe(f"upsnet_{name}"), epoch_length=1000)
    assert options.lr_schedule == fixture["lr_schedule"]
    for kind, key in (("step", "lr"), ("poly", "lr_if_poly")):
        assert len(fixture[key]) >= 7
        for iteration, rate in fixture[key].items():
            assert replace(options, lr_schedule=kind).learning_rate(int(iteration)) == rate


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
