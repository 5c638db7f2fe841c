# SPDX-License-Identifier: Apache-2.0
"""Cached features of every block at every step, kept across ticks, in one preallocated store.

`features[i, b]` is the feature that cell (i, b) computed last, in this tick or an earlier one.
The paper's three caches are views of it (see `plan.resolve_sources`): what FORWARD and TIMESTEP
reuse was computed in this tick and stands in the store already, what ROLLOUT reuses is the cell's
own entry. Only COMPUTE writes. The held noise of an episode lives here as well: this object owns
all model state that survives a tick, and `reset` is the only thing that forgets it.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from tts_policy.policy.denoisers.denoiser import DenoiserSpec
from tts_policy.policy.plan import Plan, Reuse

NEVER = -1


class FeatureCache:
    """Features [K, N, T, D], the tick each was computed in [K, N], and the held noise.

    store: [K * N + 1, T, D]; features is its view by step and block, and the last row is the
    engine's, for a constant that it adds up together with features.
    initial_noise: [1, T, A]; step_noise: [K, 1, T, A], empty for a scheduler that adds none; both
    are normally distributed with `temperature` as their deviation.
    """

    def __init__(
        self,
        spec: DenoiserSpec,
        steps: int,
        needs_noise: bool,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        temperature: float = 1.0,
    ) -> None:
        self.temperature = temperature
        self.steps, self.blocks = steps, spec.blocks
        cells, shape = steps * spec.blocks, (spec.horizon, spec.width)
        self.store = torch.zeros(cells + 1, *shape, device=device, dtype=dtype)
        self.features = self.store[:-1].view(steps, spec.blocks, *shape)
        self.computed_in = np.full((steps, spec.blocks), NEVER, np.int64)
        self.tick = 0
        noise = (1, spec.horizon, spec.action_dim)
        self.initial_noise = torch.zeros(noise, device=device, dtype=dtype)
        self.step_noise = torch.zeros(
            (steps if needs_noise else 0, *noise), device=device, dtype=dtype
        )

    def reset(self, generator: torch.Generator) -> None:
        """Forget every feature and draw the noise of a new episode."""
        self.computed_in.fill(NEVER)
        self.tick = 0
        # Nothing may read a forgotten feature; NaN would show it in the action if something did.
        self.features.fill_(float('nan'))
        self.draw_noise(generator)

    def draw_noise(self, generator: torch.Generator) -> None:
        """Draw initial and per-step noise (on the CPU, so that every device gets the same)."""
        pinned = self.store.is_cuda
        for noise in (self.initial_noise, self.step_noise):
            drawn = torch.randn(noise.shape, generator=generator, pin_memory=pinned)
            drawn.mul_(self.temperature)
            noise.copy_(drawn, non_blocking=True)

    def rollout_valid(self, max_age: int) -> NDArray[np.bool_]:
        """Cells [K, N] whose feature is at most `max_age` ticks old."""
        return (self.computed_in != NEVER) & (self.tick - self.computed_in <= max_age)

    def commit(self, plan: Plan) -> int:
        """Close the tick that executed `plan`: its computed cells are fresh now.

        Returns the age in ticks of the oldest feature that its ROLLOUT cells read, 0 if none.
        """
        read = self.computed_in[plan == Reuse.ROLLOUT]
        oldest = int(self.tick - read.min()) if read.size else 0
        self.computed_in[plan == Reuse.COMPUTE] = self.tick
        self.tick += 1
        return oldest
