# SPDX-License-Identifier: Apache-2.0
"""Cached features of every block at every step, kept across ticks, in one preallocated store.

`features[i, b]` is the feature that cell (i, b) computed last, in this tick or an earlier one. It
serves as the paper's three caches (see `plan.resolve_sources`): what FORWARD and TIMESTEP reuse
was computed in this tick and is in the store already; what ROLLOUT reuses is the cell's own entry.
Only COMPUTE writes. The noise of an episode is kept here as well: this object owns all model state
that survives a tick, and `reset` is the only thing that forgets it.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tts_policy.policy.denoisers.denoiser import DenoiserSpec
from tts_policy.policy.plan import Plan, Reuse

NEVER = -1


class FeatureCache:
    """Features [K, N, B, T, D], the tick in which each was computed [K, N], and the held noise.

    A batch of B sequences shares one plan a tick; a robot has B = 1.
    store: [K * N + 1, B, T, D]; `features` is its view by step and block. The last row belongs to
    the engine, for a constant that it adds to sums of features.
    initial_noise: [B, T, A]; step_noise: [K, B, T, A], empty for a scheduler that adds none. Both
    are normally distributed with standard deviation `temperature`.
    """

    def __init__(
        self,
        spec: DenoiserSpec,
        steps: int,
        needs_noise: bool,
        device: torch.device,
        temperature: float = 1.0,
        batch: int = 1,
    ) -> None:
        self.temperature = temperature
        self.steps, self.blocks = steps, spec.blocks
        cells, shape = steps * spec.blocks, (batch, spec.horizon, spec.width)
        self.store = torch.zeros(cells + 1, *shape, device=device)
        self.features = self.store[:-1].view(steps, spec.blocks, *shape)
        self.computed_in = np.full((steps, spec.blocks), NEVER, np.int64)
        self.tick = 0
        noise = (batch, spec.horizon, spec.action_dim)
        self.initial_noise = torch.zeros(noise, device=device)
        self.step_noise = torch.zeros(steps if needs_noise else 0, *noise, device=device)

    def noise_of(self, step: int) -> Tensor | None:
        """Noise [B, T, A] that the scheduler adds at a step; None if it adds none."""
        return self.step_noise[step] if len(self.step_noise) else None

    def reset(self, generator: torch.Generator) -> None:
        """Start an episode: forget every feature and draw new noise."""
        self.computed_in.fill(NEVER)
        self.tick = 0
        # Nothing may read a forgotten feature. If something did, NaN would show it in the action.
        self.features.fill_(float('nan'))
        self.draw_noise(generator)

    def draw_noise(self, generator: torch.Generator) -> None:
        """Draw initial and per-step noise, on the CPU so that every device gets the same."""
        pinned = self.store.is_cuda
        for noise in (self.initial_noise, self.step_noise):
            drawn = torch.randn(noise.shape, generator=generator, pin_memory=pinned)
            drawn.mul_(self.temperature)
            noise.copy_(drawn, non_blocking=True)

    def rollout_valid(self, max_age: int) -> NDArray[np.bool_]:
        """Cells [K, N] whose feature is at most `max_age` ticks old."""
        return (self.computed_in != NEVER) & (self.tick - self.computed_in <= max_age)

    def commit(self, plan: Plan) -> int:
        """End the tick that executed `plan`: the features of its computed cells are fresh.

        Returns the age in ticks of the oldest feature that a ROLLOUT cell read, 0 if none did.
        """
        read = self.computed_in[plan == Reuse.ROLLOUT]
        oldest = int(self.tick - read.min()) if read.size else 0
        self.computed_in[plan == Reuse.COMPUTE] = self.tick
        self.tick += 1
        return oldest
