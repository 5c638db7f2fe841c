# SPDX-License-Identifier: Apache-2.0
"""DDIM: deterministic sampling in few steps.

Source: Song et al., "Denoising Diffusion Implicit Models" (2021), equation 12 with sigma = 0.
Conventions are those of diffusers: leading spacing, and the noise is that of the model's output,
not recomputed from the clipped x0.
"""

from __future__ import annotations

from collections.abc import Iterator

from tts_policy.policy.schedulers.scheduler import Row, Scheduler, register_scheduler


@register_scheduler('ddim')
class DDIM(Scheduler):
    """The clean sample, noised again as the next timestep has it, with the predicted noise."""

    def rows(self) -> Iterator[Row]:
        """Yield the coefficients of every step, in the precision of the noise schedule."""
        spec, alphas = self.spec, self.spec.alphas_cumprod()
        stride = spec.train_steps // spec.steps
        final = alphas.new_ones(()) if spec.set_alpha_to_one else alphas[0]
        for t in map(int, spec.timesteps()):
            now = alphas[t]
            before = alphas[t - stride] if t >= stride else final
            noise = (1 - before) ** 0.5
            if spec.prediction == 'epsilon':
                yield (*self.x0_coefficients(now), before**0.5, 0.0, noise)
            else:
                # epsilon = (x - sqrt(now) * output) / sqrt(1 - now)
                scale = noise / (1 - now) ** 0.5
                yield (*self.x0_coefficients(now), before**0.5, scale, -scale * now**0.5)
