# SPDX-License-Identifier: Apache-2.0
"""The steps of the paper's ablation, as memories for the eager engine.

Both give the same keys and values as `ConditionalMemory`; they differ in when they make them.
Source: arXiv 2605.13316, the ablation of the time of one chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tts_policy.policy.denoisers.denoiser import Conditioner, Denoiser
from tts_policy.policy.denoisers.transformer import (
    ConditionalMemory,
    Conditioning,
    TransformerDenoiser,
)
from tts_policy.policy.engines.eager import EagerEngine
from tts_policy.policy.schedulers.scheduler import Scheduler


class PerStepMemory(ConditionalMemory):
    """Encodes time and observation anew at every step that needs them, as upstream does."""

    def __init__(self, denoiser: TransformerDenoiser, timesteps: list[float]) -> None:
        super().__init__(denoiser, timesteps)
        self._denoiser = denoiser
        self._timesteps = torch.tensor(timesteps, device=denoiser.device)
        self._features = torch.empty(0)
        self._step, self._memory = -1, torch.empty(0)

    def encode(self, features: Tensor) -> None:
        """Keep the features; the observation tokens are made for the pruner alone."""
        self.observation_tokens = self._denoiser.encoder.observation_tokens(features)
        self._features, self._step = features, -1

    def keys_values(self, step: int, layer: int) -> Conditioning:
        """Keys and values of one layer at one step."""
        if step != self._step:
            encoder = self._denoiser.encoder
            time = encoder.time_tokens(self._timesteps[step : step + 1])[:, None]
            tokens = encoder.observation_tokens(self._features)
            self._memory, self._step = torch.cat([time, tokens], dim=1), step
        return self._denoiser.conditioning(layer, self._memory)


class AllStepsMemory(ConditionalMemory):
    """Encodes all steps of a tick in one batch, time tokens included, as the paper does."""

    def __init__(self, denoiser: TransformerDenoiser, timesteps: list[float]) -> None:
        super().__init__(denoiser, timesteps)
        self._denoiser = denoiser
        self._timesteps = torch.tensor(timesteps, device=denoiser.device)
        self._keys_values: list[tuple[Tensor, Tensor]] = []

    def encode(self, features: Tensor) -> None:
        """Encode the features [1, To, Do] of a tick with every step's time token."""
        encoder, steps = self._denoiser.encoder, len(self._timesteps)
        time = encoder.time_tokens(self._timesteps)[:, None]
        tokens = encoder.observation_tokens(features.expand(steps, -1, -1))
        self.observation_tokens = tokens[:1]
        memory = torch.cat([time, tokens], dim=1)
        self._keys_values = [
            block.keys_values(memory) for block in self._denoiser.cross_attentions
        ]

    def keys_values(self, step: int, layer: int) -> Conditioning:
        """Keys and values of one layer at one step."""
        keys, values = self._keys_values[layer]
        denoiser = self._denoiser
        return Conditioning(
            keys[step : step + 1],
            values[step : step + 1],
            denoiser.memory_mask,
        )


def eager_with(memory: type[ConditionalMemory]) -> type[EagerEngine]:
    """Eager engine that encodes through another memory."""

    class Ablated(EagerEngine):
        def make_conditioner(self, denoiser: Denoiser, scheduler: Scheduler) -> Conditioner:
            assert isinstance(denoiser, TransformerDenoiser)
            return memory(denoiser, scheduler.spec.timesteps())

    return Ablated
