# SPDX-License-Identifier: Apache-2.0
"""Noise schedulers: squared-cosine training schedule, DDPM and DDIM sampling as folded tables.

Every sampling step of either scheduler is
    x0 = clip(to_x0_x[i] * x + to_x0_eps[i] * eps, -1, 1)
    x  = next_x0[i] * x0 + next_x[i] * x + next_eps[i] * eps + next_noise[i] * z[i]
with coefficients that are folded once.
Sources: Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (squared cosine), Song et al. 2021 (DDIM);
conventions (leading spacing, fixed small variance, clipping) are those of Diffusion Policy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def squared_cosine_alphas_cumprod(train_steps: int) -> Tensor:
    """Cumulative product of alphas, float64 [train_steps], betas clipped at 0.999."""

    def alpha_bar(fraction: float) -> float:
        return math.cos((fraction + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [
        min(1 - alpha_bar((i + 1) / train_steps) / alpha_bar(i / train_steps), 0.999)
        for i in range(train_steps)
    ]
    return torch.cumprod(1.0 - torch.tensor(betas, dtype=torch.float64), dim=0)


@dataclass(frozen=True)
class SchedulerSpec:
    """`kind` is 'ddpm' or 'ddim'; `steps` denoising steps are taken of `train_steps`."""

    kind: str
    steps: int
    train_steps: int = 100

    def __post_init__(self) -> None:
        """Refuse what cannot be sampled; raises ValueError naming the field."""
        if self.kind not in ('ddpm', 'ddim'):
            raise ValueError(f"scheduler kind must be 'ddpm' or 'ddim', got {self.kind!r}")
        if not 1 <= self.train_steps <= 10_000:
            raise ValueError(f'train_steps must be in [1, 10000], got {self.train_steps}')
        if not 1 <= self.steps <= self.train_steps:
            raise ValueError(
                f'scheduler steps must be in [1, {self.train_steps}], got {self.steps}'
            )
        if self.kind == 'ddpm' and self.steps != self.train_steps:
            raise ValueError(
                f'a ddpm scheduler takes all {self.train_steps} steps, got {self.steps}'
            )

    def timesteps(self) -> list[int]:
        """Training timestep of every denoising step, noisiest first (leading spacing)."""
        stride = self.train_steps // self.steps
        return [i * stride for i in range(self.steps)][::-1]


class NoiseScheduler:
    """One sampler; coefficients are Python floats, folded once."""

    clip = 1.0  # bound of the clean sample x0

    def __init__(self, spec: SchedulerSpec) -> None:
        self.spec = spec
        self._rows = [self._coefficients(spec, t) for t in spec.timesteps()]

    @staticmethod
    def _coefficients(spec: SchedulerSpec, t: int) -> tuple[float, ...]:
        """to_x0_x, to_x0_eps, next_x0, next_x, next_eps, next_noise of training timestep t."""
        alphas_cumprod = squared_cosine_alphas_cumprod(spec.train_steps).tolist()
        stride = spec.train_steps // spec.steps
        now = alphas_cumprod[t]
        before = alphas_cumprod[t - stride] if t >= stride else 1.0
        to_x0 = (now**-0.5, -((1 - now) ** 0.5) / now**0.5)
        if spec.kind == 'ddim':
            return (*to_x0, before**0.5, 0.0, (1 - before) ** 0.5, 0.0)
        alpha = now / before
        variance = max((1 - before) / (1 - now) * (1 - alpha), 1e-20) if t > 0 else 0.0
        x0 = before**0.5 * (1 - alpha) / (1 - now)
        x = alpha**0.5 * (1 - before) / (1 - now)
        return (*to_x0, x0, x, 0.0, variance**0.5)

    @property
    def coefficients(self) -> list[tuple[float, ...]]:
        """to_x0_x, to_x0_eps, next_x0, next_x, next_eps, next_noise of every step."""
        return list(self._rows)

    @property
    def needs_noise(self) -> bool:
        """Whether a step adds noise of its own (DDPM does, DDIM does not)."""
        return self.spec.kind == 'ddpm'

    def step(self, i: int, x: Tensor, eps: Tensor, noise: Tensor | None) -> Tensor:
        """One denoising step: x [..., T, A] -> the less noisy x; `noise` is z_i [..., T, A].

        DDPM reads `noise`, DDIM ignores it.
        """
        to_x0_x, to_x0_eps, next_x0, next_x, next_eps, next_noise = self._rows[i]
        x0 = (to_x0_x * x + to_x0_eps * eps).clamp(-self.clip, self.clip)
        if not self.needs_noise:
            return next_x0 * x0 + next_eps * eps
        assert noise is not None, 'a DDPM step needs its noise'
        return next_x0 * x0 + next_x * x + next_noise * noise


class TrainingNoise(nn.Module):
    """Forward diffusion of the training schedule: q(x_t | x_0)."""

    signal: Tensor
    noise: Tensor

    def __init__(self, train_steps: int) -> None:
        super().__init__()
        alphas_cumprod = squared_cosine_alphas_cumprod(train_steps)
        self.register_buffer('signal', alphas_cumprod.sqrt().float(), persistent=False)
        self.register_buffer('noise', (1 - alphas_cumprod).sqrt().float(), persistent=False)

    def add(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Diffuse clean x0 [B, T, A] to timestep t [B] with the given noise [B, T, A]."""
        return self.signal[t, None, None] * x0 + self.noise[t, None, None] * noise
