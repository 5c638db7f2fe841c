# SPDX-License-Identifier: Apache-2.0
"""Flow matching, sampled by Euler steps.

The convention is LeRobot's: time t runs from 0 (noise) to 1 (data), x_t = t x0 + (1 - t) z, and
the model predicts the velocity v = x0 - z. Step i of K is at t = i / K; the Euler step x + v / K
goes by way of x0 = x + (1 - t) v, so that x0 can be clipped.
Source: Lipman et al., "Flow Matching for Generative Modeling" (2023), with sigma_min = 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tts_policy.policy.schedulers.scheduler import (
    FLOW,
    Row,
    Scheduler,
    SchedulerSpec,
    register_scheduler,
)


@register_scheduler(FLOW)
class Euler(Scheduler):
    """Euler steps of equal length."""

    objective = FLOW
    predictions = ('velocity',)

    @classmethod
    def timesteps(cls, spec: SchedulerSpec) -> list[int] | list[float]:
        """Time i / K of every step."""
        return [i / spec.steps for i in range(spec.steps)]

    def rows(self) -> Iterator[Row]:
        """Yield the coefficients of every step."""
        for t in self.spec.timesteps():
            share = 1 / self.spec.steps / (1 - t)
            yield 1.0, 1 - t, share, 1 - share

    def noise_levels(self) -> list[tuple[float, float]]:
        """Factors of signal and noise in x before every step, (1, 0) after the last: [K + 1]."""
        return [*((t, 1 - t) for t in self.spec.timesteps()), (1.0, 0.0)]


def flow_targets(x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy x_t [B, T, A], times t [B] and velocities [B, T, A] of clean actions x0 [B, T, A].

    Times are 0.999 (1 - u) with u ~ Beta(1.5, 1), denser towards the noise; this distribution is
    that of Black et al., "pi0" (2024).
    """
    uniform = torch.rand(len(x0), generator=generator)
    t = 0.999 * (1 - uniform ** (2 / 3))
    noise = torch.randn(x0.shape, generator=generator)
    share = t[:, None, None]
    return share * x0 + (1 - share) * noise, t, x0 - noise
