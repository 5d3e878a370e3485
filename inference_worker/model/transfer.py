"""Small copies between the host and the device that neither waits for.

A copy from pageable memory, and any copy to the host, makes the host wait until the device has done all its work; with
a step in flight that is the whole step.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch


def upload(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array on the device; on a CPU it is the array itself, which must not change after this."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    if device.type != "cuda":
        return tensor.to(device)
    # torch keeps the pinned memory until the copy is over
    return tensor.pin_memory().to(device, non_blocking=True)


def upload_into(array: npt.NDArray[Any], target: torch.Tensor) -> None:
    """Copy the array into a tensor of its shape, after what the device has been told before."""
    source = torch.from_numpy(array)
    if target.device.type == "cuda":
        source = source.pin_memory()
    target.copy_(source, non_blocking=True)


class Download:
    """A tensor on its way to the host. On a CPU it is the tensor itself, which must not change before it is read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = tensor
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def tolist(self) -> list[Any]:
        """Wait for the copy; its elements as nested lists of Python numbers."""
        if self._event is not None:
            self._event.synchronize()
        elements: list[Any] = self._host.tolist()
        return elements
