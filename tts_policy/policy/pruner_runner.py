# SPDX-License-Identifier: Apache-2.0
"""Runs a pruner beside whatever the main stream does, without an allocation or a needless wait.

On a GPU it has a stream of its own and, beside engines that capture, a graph for every sparsity
that it knows; its logits arrive in page-locked memory, and waiting for them is the one wait before
the actions. On a CPU it is called in line.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from tts_policy.policy.engines.capture import Capture, Capturer, Unit
from tts_policy.policy.pruner import PlanPruner
from tts_policy.policy.transfer import Download


class InlinePruner:
    """A pruner that is called when it is asked, on any device."""

    def __init__(self, pruner: PlanPruner, time_tokens: Tensor) -> None:
        self._pruner, self._gates = pruner, pruner.gates(time_tokens)
        self._logits = torch.empty(0)

    def start(self, observation_tokens: Tensor, sparsity: float) -> None:
        """Start on the observation tokens [1, To, .], which must last until `logits`."""
        self._logits = self._pruner(self._gates, observation_tokens, sparsity)[0]

    def logits(self) -> NDArray[Any]:
        """Wait for the logits [K, N, 4]; the next start may overwrite them."""
        array: NDArray[Any] = self._logits.cpu().numpy()
        return array


class CapturedPruner(InlinePruner):
    """A pruner with static buffers, captured on a GPU; overlap: on a stream of its own there."""

    def __init__(
        self,
        pruner: PlanPruner,
        time_tokens: Tensor,
        observation_tokens: Tensor,
        overlap: bool = True,
        capture: Capturer | None = None,
    ) -> None:
        """Capture; observation_tokens [1, To, .] are an example of what will come."""
        super().__init__(pruner, time_tokens)
        self._device = time_tokens.device
        self._tokens = torch.zeros_like(observation_tokens)
        example = pruner(self._gates, self._tokens, 0.0)[0]
        self._on_device = torch.zeros_like(example)
        self._download = Download(tuple(example.shape), example.dtype, self._device)
        on_gpu = self._device.type == 'cuda'
        self._stream = torch.cuda.Stream(self._device) if on_gpu and overlap else None
        capture = capture or Capture(self._device)
        self._graphs = {known: capture(self._unit(known)) for known in pruner.sparsities}

    def _unit(self, sparsity: float) -> Unit:
        def run() -> None:
            self._on_device.copy_(self._pruner(self._gates, self._tokens, sparsity)[0])

        return run

    def start(self, observation_tokens: Tensor, sparsity: float) -> None:
        """Start on the observation tokens [1, To, .], which must last until `logits`."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._tokens.copy_(observation_tokens)
            if self._graphs:
                self._graphs[self._pruner.trained_for(sparsity)]()
            else:
                self._unit(sparsity)()
            self._download.start(self._on_device)

    def logits(self) -> NDArray[Any]:
        """Wait for the logits [K, N, 4]; the next start overwrites them."""
        return self._download.wait()
