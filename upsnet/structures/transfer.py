"""Copies between host and device for which neither waits."""

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device; the host goes on at once."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # a copy from other memory may wait for the device
    return tensor.to(device, non_blocking=True)


class Download:
    """A tensor on its way from the device to the host."""

    def __init__(self, tensor: Tensor) -> None:
        """Enqueues the copy; the host goes on at once."""
        self._host = tensor.detach().to("cpu", non_blocking=True)
        on_cuda = tensor.device.type == "cuda"
        self._arrived = torch.cuda.current_stream(tensor.device).record_event() if on_cuda else None

    def wait(self) -> Tensor:
        """The host's tensor, once it is there. Work that was enqueued later goes on meanwhile."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host
