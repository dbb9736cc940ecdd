"""The dense part on request: compiled, or as CUDA graphs. The graphs themselves are recorded in `test_gpu.py`."""

import logging
import shutil

import pytest
import torch

from tests.models.small import photo_sample, small_network, training_batch
from tests.models.test_inference import tensors_of
from upsnet.dataset.batches import collate
from upsnet.models import dense
from upsnet.models.dense import GRAPHS, CompiledDense, RecordedDense
from upsnet.models.inference import prepare
from upsnet.structures.results import OUTPUTS

SEMANTIC = frozenset({"semantic"})


def images_of(width):
    return torch.zeros(1, 3, 32, width)


class Pass:
    """Stands in for a recorded graph."""

    made: list[tuple[int, frozenset[str]]]

    def __init__(self, run, images, outputs):
        self.made.append((images.shape[-1], outputs))

    def replay(self, images):
        return f"graph of {images.shape[-1]}"


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(dense, "_Graph", Pass)
    Pass.made = []
    return RecordedDense(lambda images, _: f"pass of {images.shape[-1]}")


def test_a_size_is_recorded_when_it_comes_again(recorded):
    found = [recorded(images_of(width), OUTPUTS) for width in (32, 64, 32, 32, 64)]
    assert found == ["pass of 32", "pass of 64", "graph of 32", "graph of 32", "graph of 64"]
    assert Pass.made == [(32, OUTPUTS), (64, OUTPUTS)]


def test_a_graph_belongs_to_what_is_asked_for(recorded):
    for outputs in (OUTPUTS, SEMANTIC, SEMANTIC, OUTPUTS):
        recorded(images_of(32), outputs)
    assert Pass.made == [(32, SEMANTIC), (32, OUTPUTS)]


def test_only_the_last_sizes_stay(recorded):
    widths = [32 * (i + 1) for i in range(GRAPHS)]
    for width in [*widths, *widths, widths[0], 1024]:  # the last one pushes the second out
        recorded(images_of(width), OUTPUTS)
    assert [width for width, _ in Pass.made] == widths
    assert recorded(images_of(widths[0]), OUTPUTS) == f"graph of {widths[0]}"
    assert recorded(images_of(widths[1]), OUTPUTS) == f"pass of {widths[1]}"


def test_on_a_cpu_graphs_step_aside_with_a_word(caplog):
    network, images = small_network().eval(), training_batch("things and stuff").images
    with caplog.at_level(logging.WARNING, "upsnet"), torch.inference_mode():
        found = prepare(network, cuda_graph=True).features(images)
    assert [r.getMessage() for r in caplog.records] == [
        "test.cuda_graph: only a CUDA device records graphs; the CPU predicts as ever"
    ]
    torch.testing.assert_close(found.scores, network.features(images).scores, rtol=1e-4, atol=1e-5)


def test_without_a_compiler_one_warning_and_the_plain_network(caplog, monkeypatch):
    calls = []

    def fails(*_):
        calls.append(1)
        raise RuntimeError("no C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    network, batch = small_network().eval(), training_batch("things and stuff")
    prepared = prepare(network, compiled=True)
    with caplog.at_level(logging.WARNING, "upsnet"), torch.inference_mode():
        found = [prepared(batch)[0] for _ in range(3)]
        expected = prepare(network)(batch)[0]
    assert all((f.segment_map == expected.segment_map).all() for f in found) and calls == [1]
    assert [r.getMessage() for r in caplog.records] == [
        "test.compile: the network is not compiled and stays as it is (no C++ compiler)"
    ]


def test_an_error_of_the_network_is_not_taken_for_the_compilers(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda run, **_: run)

    def broken(*_):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        CompiledDense(lambda *given: broken(*given))(images_of(32), OUTPUTS)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_features_are_the_plain_ones_at_every_size():
    network = small_network(lively=True).eval()
    compiled, plain = prepare(network, compiled=True), prepare(network)
    assert isinstance(vars(compiled)["features"], CompiledDense)
    graphs = []
    with torch.inference_mode():
        # So large that PyTorch chooses the same convolutions for all of them; lying, upright, square.
        for size in ((192, 256), (192, 300), (280, 200), (224, 224)):
            images = collate([photo_sample(size=size)]).images
            pairs = zip(tensors_of(compiled.features(images)), tensors_of(plain.features(images)), strict=True)
            for found, expected in pairs:
                torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1, "compiled anew for another size"
