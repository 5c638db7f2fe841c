# SPDX-License-Identifier: Apache-2.0
"""The device that a policy runs on, and buffers that carry data to it and back.

Buffers are allocated once. Their host sides are page-locked where the device is a GPU, so that the
host does not wait for a transfer. The host must not write the buffer of an upload again before the
tick has ended, which waiting for a download of the same tick ensures. On a CPU both sides of an
upload are one tensor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DEVICES = ('cpu', 'cuda')


def find_device(name: str) -> torch.device:
    """Device of a name; raises ValueError unless it is one of DEVICES and available here."""
    if name not in DEVICES:
        raise ValueError(
            f'device: expected one of {list(DEVICES)} (CUDA_VISIBLE_DEVICES chooses among '
            f'several GPUs), got {name!r}'
        )
    if name == 'cuda' and not torch.cuda.is_available():
        raise ValueError(f"device: expected 'cpu' on a machine without CUDA, got {name!r}")
    return torch.device(name)


def set_threads(count: int) -> None:
    """Let torch use so many threads; raises ValueError for a number that is not positive."""
    if count < 1:
        raise ValueError(f'threads: expected at least 1, got {count}')
    torch.set_num_threads(count)


class Upload:
    """From the host to one static tensor on the device."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        on_gpu = device.type == 'cuda'
        self.host = torch.zeros(shape, dtype=dtype, pin_memory=on_gpu)
        self.device = torch.zeros(shape, dtype=dtype, device=device) if on_gpu else self.host

    def send(self, values: NDArray[Any]) -> Tensor:
        """Send values [n, ...] to the first rows and return the whole tensor on the device.

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
        """Copy values of this shape once the current stream has computed them."""
        self._host.copy_(values, non_blocking=True)
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(values.device))

    def wait(self) -> NDArray[Any]:
        """Return what was copied, in a buffer that the next `start` overwrites."""
        if self._done is not None:
            self._done.synchronize()
        array: NDArray[Any] = self._host.numpy()
        return array
