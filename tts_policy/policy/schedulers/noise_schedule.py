# SPDX-License-Identifier: Apache-2.0
"""How much signal and noise a noisy action holds at every training timestep of a diffusion.

Sources: Ho et al. 2020 (DDPM); Nichol & Dhariwal 2021 (squared cosine). Names are those of
diffusers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SQUARED_COSINE = 'squaredcos_cap_v2'
BETA_SCHEDULES = (SQUARED_COSINE, 'linear', 'scaled_linear', 'sigmoid')


def squared_cosine_alphas_cumprod(train_steps: int) -> Tensor:
    """Cumulative product of alphas, float64 [train_steps], betas clipped at 0.999."""

    def alpha_bar(fraction: float) -> float:
        return math.cos((fraction + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [
        min(1 - alpha_bar((i + 1) / train_steps) / alpha_bar(i / train_steps), 0.999)
        for i in range(train_steps)
    ]
    return torch.cumprod(1.0 - torch.tensor(betas, dtype=torch.float64), dim=0)


def alphas_cumprod(schedule: str, train_steps: int, low: float, high: float) -> Tensor:
    """Cumulative product of alphas [train_steps] of a schedule with betas from low to high.

    Float64 for the squared cosine, which has no low and high. The others are in single precision,
    as in diffusers, and so are coefficients made of them: where a step adds little noise that
    rounding is not small, and networks that come with these schedules were sampled with it.
    """
    if schedule == SQUARED_COSINE:
        return squared_cosine_alphas_cumprod(train_steps)
    if schedule == 'linear':
        betas = torch.linspace(low, high, train_steps, dtype=torch.float32)
    elif schedule == 'scaled_linear':
        betas = torch.linspace(low**0.5, high**0.5, train_steps, dtype=torch.float32) ** 2
    else:
        ramp = torch.sigmoid(torch.linspace(-6, 6, train_steps, dtype=torch.float32))
        betas = ramp * (high - low) + low
    return torch.cumprod(1.0 - betas, dim=0)


class TrainingNoise(nn.Module):
    """Forward diffusion of the training schedule: q(x_t | x_0)."""

    signal: Tensor
    noise: Tensor

    def __init__(self, train_steps: int) -> None:
        super().__init__()
        alphas = squared_cosine_alphas_cumprod(train_steps)
        self.register_buffer('signal', alphas.sqrt().float(), persistent=False)
        self.register_buffer('noise', (1 - alphas).sqrt().float(), persistent=False)

    def add(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Diffuse clean x0 [B, T, A] to timestep t [B] with the given noise [B, T, A]."""
        return self.signal[t, None, None] * x0 + self.noise[t, None, None] * noise
