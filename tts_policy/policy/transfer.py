# SPDX-License-Identifier: Apache-2.0
"""Buffers that carry data between host and device without an allocation or a needless wait.

Host sides are page-locked where the device is a GPU. An upload is not waited for: the host must
not write its buffer again before the tick has ended, which waiting for a download of the same tick
makes sure. On a CPU both sides of an upload are one tensor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Upload:
    """From the host to one static tensor on the device."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        on_gpu = device.type == 'cuda'
        self.host = torch.zeros(shape, dtype=dtype, pin_memory=on_gpu)
        self.device = torch.zeros(shape, dtype=dtype, device=device) if on_gpu else self.host

    def send(self, values: NDArray[Any]) -> Tensor:
        """Send values to the first rows; returns the tensor on the device, always the same.

        Values may be laid out in any way, as those of a flipped image are.
        """
        rows = len(values)
        self.host[:rows].copy_(torch.from_numpy(np.ascontiguousarray(values)))
        if self.device is not self.host:
            self.device[:rows].copy_(self.host[:rows], non_blocking=True)
        return self.device


class Download:
    """From the device to the host, in stream order."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        on_gpu = device.type == 'cuda'
        self._host = torch.zeros(shape, dtype=dtype, pin_memory=on_gpu)
        self._done = torch.cuda.Event() if on_gpu else None

    def start(self, values: Tensor) -> None:
        """Copy values of this shape once the current stream has made them."""
        self._host.copy_(values, non_blocking=True)
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(values.device))

    def wait(self) -> NDArray[Any]:
        """Return what was copied, in a buffer that the next `start` overwrites."""
        if self._done is not None:
            self._done.synchronize()
        array: NDArray[Any] = self._host.numpy()
        return array
