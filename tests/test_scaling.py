"""The rule of benchmarks/scaling.py at places where its answer is known."""

import pytest

from benchmarks.scaling import NVLINK, REACHED, check_rows, exposed, hierarchical, ring, slowest_of
from benchmarks.throughput import PLAIN, SIDE_BY_SIDE, Measured

NETWORK = 12.5e9


def test_an_all_reduce_sends_twice_the_gradients_over_the_slowest_link():
    assert ring(1e12, 256, NETWORK) == pytest.approx(2e12 / (REACHED * NETWORK), rel=0.005)
    assert ring(1e12, 2, NETWORK) == pytest.approx(1e12 / (REACHED * NVLINK), rel=1e-3), "two GPUs of one node"
    assert hierarchical(1e12, 8, NETWORK) == pytest.approx(ring(1e12, 8, NETWORK))
    in_nodes = 2e12 * 7 / 8 / (REACHED * NVLINK)
    assert hierarchical(1e12, 16, NETWORK) == pytest.approx(in_nodes + 1e12 / (REACHED * NETWORK))


def test_small_gradients_cost_messages():
    assert ring(1, 256, NETWORK) > hierarchical(1, 256, NETWORK) > hierarchical(1, 16, NETWORK) > 20e-6


def test_the_last_bucket_is_never_hidden():
    assert exposed(1.0, 50e6, overlap=10.0) == 0.5 and exposed(1.0, 1e6, overlap=10.0) == 1.0
    assert exposed(1.0, 100e6, overlap=0.5) == 0.5 and exposed(1.0, 100e6, overlap=0.0) == 1.0


def test_a_step_waits_for_the_slowest():
    assert slowest_of(1, [1.0, 2.0]) == pytest.approx(1.5, abs=0.02)
    assert slowest_of(2, [1.0, 2.0]) == pytest.approx(1.75, abs=0.02)
    assert slowest_of(256, [1.0, 2.0]) == pytest.approx(2.0)


def test_the_prediction_stands_beside_the_measurement():
    steps = {PLAIN: [1.0], "torchrun": [1.25], SIDE_BY_SIDE: [1.05, 1.05]}
    rows = check_rows(Measured(steps, all_reduce=0.05, gradient_bytes=10**8, batch=8))
    assert rows[2:] == ["| torchrun | 1100 | 1250 | -12.0% | 1.82 × | 1.60 × |"]
