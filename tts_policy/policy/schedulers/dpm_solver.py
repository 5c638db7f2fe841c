# SPDX-License-Identifier: Apache-2.0
"""DPM-Solver++(2M): a second-order multistep solver, for few steps.

Source: Lu et al., "DPM-Solver++" (2022), algorithm 2, in its midpoint form. Conventions are those
of diffusers' DPMSolverMultistepScheduler with algorithm_type 'dpmsolver++' and solver_order 2:
timesteps are linearly spaced, the first and the last step are of first order, and the last one
ends at the clean sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from tts_policy.policy.schedulers.scheduler import (
    Row,
    Scheduler,
    SchedulerSpec,
    register_scheduler,
)


@register_scheduler('dpm_solver')
class DPMSolver(Scheduler):
    """x' = (sigma' / sigma) x + alpha' (1 - e^-h) D, where D extrapolates from the last two x0.

    With lambda = log(alpha / sigma) and h = lambda' - lambda, D = (1 + 1 / (2 r)) x0 - 1 / (2 r)
    previous_x0, and r is the last h over this one.
    """

    @classmethod
    def timesteps(cls, spec: SchedulerSpec) -> list[int] | list[float]:
        """Timestep of every step: evenly spaced from the noisiest, and 0 left out."""
        spaced = np.linspace(0, spec.train_steps - 1, spec.steps + 1).round()
        return [int(t) for t in spaced[:0:-1]]

    def rows(self) -> Iterator[Row]:
        """Yield the coefficients of every step."""
        alphas = self.spec.alphas_cumprod().double()
        levels = self.noise_levels()
        ratios = [math.log(signal / noise) for signal, noise in levels[:-1]] + [math.inf]
        for i, t in enumerate(self.spec.timesteps()):
            (_, noise), (next_signal, next_noise) = levels[i], levels[i + 1]
            h = ratios[i + 1] - ratios[i]
            gain = -next_signal * math.expm1(-h)
            share = 0.0
            if 0 < i < self.spec.steps - 1:
                share = 0.5 * h / (ratios[i] - ratios[i - 1])
            yield (
                *self.x0_coefficients(alphas[int(t)]),
                gain * (1 + share),
                next_noise / noise,
                0.0,
                0.0,
                -gain * share,
            )
