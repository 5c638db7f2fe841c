# SPDX-License-Identifier: Apache-2.0
"""Units of work on static buffers: captured CUDA graphs, plain calls on any other device.

A unit takes no arguments and returns nothing: what it reads and writes are buffers that live as
long as it does, and the step it works at stands in one of them. The same functions are captured on
a GPU and called on a CPU, so that what a graph replays is tested without one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Unit = Callable[[], None]
WARM_UP = 2


class Capturer(Protocol):
    """What makes units of functions."""

    def __call__(self, unit: Unit, prepare: Unit | None = None) -> Unit:
        """Make a unit; it may be run a few times first, each time after `prepare`."""


class Capture:
    """Makes units for one stream of a device.

    The graphs of one instance share their scratch memory, so they must run one after another;
    concurrent streams need an instance each. What a unit makes anew and keeps is overwritten by
    every replay, and only the first unit of an instance may keep anything.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == 'cuda':
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)

    def __call__(self, unit: Unit, prepare: Unit | None = None) -> Unit:
        """Capture a unit, after it has run a few times, each time after `prepare`."""
        if self._device.type != 'cuda':
            return unit
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP):
                if prepare is not None:
                    prepare()
                unit()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            unit()
        replay: Unit = graph.replay
        return replay
