# SPDX-License-Identifier: Apache-2.0
"""DDPM: ancestral sampling, which adds noise at every step but the last.

Source: Ho et al., "Denoising Diffusion Probabilistic Models" (2020), equation 7; conventions are
those of diffusers, which Diffusion Policy uses.
"""

from __future__ import annotations

from collections.abc import Iterator

from tts_policy.policy.schedulers.scheduler import Row, Scheduler, register_scheduler


@register_scheduler('ddpm')
class DDPM(Scheduler):
    """The mean of q(x_{t-1} | x_t, x0) at the clipped x0, and noise of its variance."""

    needs_noise = True

    def rows(self) -> Iterator[Row]:
        """Yield the coefficients of every step, in the precision of the noise schedule."""
        spec, alphas = self.spec, self.spec.alphas_cumprod()
        stride = spec.train_steps // spec.steps
        for t in map(int, spec.timesteps()):
            now = alphas[t]
            before = alphas[t - stride] if t >= stride else alphas.new_ones(())
            alpha = now / before
            small = ((1 - before) / (1 - now) * (1 - alpha)).clamp(min=1e-20)
            variance = 1 - alpha if spec.variance == 'fixed_large' else small
            x0 = before**0.5 * (1 - alpha) / (1 - now)
            x = alpha**0.5 * (1 - before) / (1 - now)
            noise = variance**0.5 if t > 0 else 0.0
            yield (*self.x0_coefficients(now), x0, x, 0.0, noise)
