"""The dense part of a network, photo to features, compiled or recorded: on request, since both take their time first.

Both take the place of `UPSNet.features`, whose work depends on the photo's size alone. What comes after it depends on
what is seen, and stays as it is.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from upsnet.models.rpn import RPNOutput
from upsnet.models.upsnet import Features
from upsnet.structures.results import OUTPUTS, Output

logger = logging.getLogger("upsnet")

Dense = Callable[[Tensor, frozenset[Output]], Features]

GRAPHS = 4
"""Recorded graphs that are kept. Each holds the memory of a pass."""


class CompiledDense:
    """`torch.compile` of the dense part, once for photos of all sizes; once more for other `outputs`, or for batches
    after single photos. Where the compiler is missing or gives up, one warning says so and the plain part serves."""

    def __init__(self, dense: Dense) -> None:
        self._plain = dense
        self._run: Dense = torch.compile(dense, dynamic=True)

    def __call__(self, images: Tensor, outputs: frozenset[Output] = OUTPUTS) -> Features:
        if self._run is self._plain:
            return self._plain(images, outputs)
        try:
            return self._run(images, outputs)
        except RuntimeError as error:
            # Of the compiler, most likely; if it is of the network, the plain part raises it again.
            features = self._plain(images, outputs)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            logger.warning("test.compile: the network is not compiled and stays as it is (%s)", reason)
            self._run = self._plain
            return features


class RecordedDense:
    """The dense part as CUDA graphs: one launch instead of hundreds. A size is recorded when it comes again; the last
    `GRAPHS` sizes stay."""

    def __init__(self, dense: Dense) -> None:
        self._dense = dense
        self._graphs: OrderedDict[tuple[tuple[int, ...], frozenset[Output]], _Graph | None] = OrderedDict()

    def __call__(self, images: Tensor, outputs: frozenset[Output] = OUTPUTS) -> Features:
        key = tuple(images.shape), outputs
        if key not in self._graphs:
            self._graphs[key] = None
            self._drop_oldest()
            return self._dense(images, outputs)
        graph = self._graphs[key] = self._graphs[key] or _Graph(self._dense, images, outputs)
        self._graphs.move_to_end(key)
        return graph.replay(images)

    def _drop_oldest(self) -> None:
        while len(self._graphs) > GRAPHS:
            self._graphs.popitem(last=False)


class _Graph:
    """One recorded pass with its own input and results."""

    def __init__(self, dense: Dense, images: Tensor, outputs: frozenset[Output]) -> None:
        self._images = images.clone()
        self._graph = torch.cuda.CUDAGraph()
        # Libraries choose their kernels and take their memory in a pass before, on a stream of its own.
        stream = torch.cuda.Stream(images.device)
        stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(stream):
            dense(self._images, outputs)
        torch.cuda.current_stream(images.device).wait_stream(stream)
        with torch.cuda.graph(self._graph):
            self._features = dense(self._images, outputs)

    def replay(self, images: Tensor) -> Features:
        self._images.copy_(images)
        self._graph.replay()
        return _copied(self._features)


def _copied(features: Features) -> Features:
    """The next pass overwrites the results of a graph, while another view of the photo may still be looked at."""
    rpn = features.rpn
    return Features(
        [level.clone() for level in features.levels],
        RPNOutput([t.clone() for t in rpn.logits], [t.clone() for t in rpn.deltas], [t.clone() for t in rpn.anchors]),
        features.scores.clone(),
    )
