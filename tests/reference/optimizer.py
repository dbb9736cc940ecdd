"""The optimiser in Caffe's form, one number at a time."""

from collections.abc import Sequence


class SlowCaffeSGD:
    """Weights, gradients and buffers as flat lists of floats, one list for each parameter."""

    def __init__(
        self, weights: Sequence[list[float]], factors: Sequence[float], decays: Sequence[float], momentum: float
    ):
        self.weights = [list(w) for w in weights]
        self.buffers = [[0.0] * len(w) for w in weights]
        self.factors, self.decays, self.momentum = factors, decays, momentum

    def step(self, gradients: Sequence[list[float] | None], rate: float) -> None:
        for weights, buffers, gradient, factor, decay in zip(
            self.weights, self.buffers, gradients, self.factors, self.decays, strict=True
        ):
            if gradient is None:
                continue
            for i in range(len(weights)):
                buffers[i] = self.momentum * buffers[i] + factor * rate * (gradient[i] + decay * weights[i])
                weights[i] -= buffers[i]

    def divide_momentum(self, divisor: float) -> None:
        self.buffers = [[value / divisor for value in buffer] for buffer in self.buffers]
