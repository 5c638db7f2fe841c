# SPDX-License-Identifier: Apache-2.0
"""Schedulers: training noise, and DDPM, DDIM and flow-matching sampling as folded tables.

Every sampling step of either scheduler is, for a model that predicts noise (or the clean sample,
then read eps as that prediction),
    x0 = clip(to_x0_x[i] * x + to_x0_eps[i] * eps)
    x  = next_x0[i] * x0 + next_x[i] * x + next_eps[i] * eps + next_noise[i] * z[i]
with coefficients that are folded once. Flow matching follows LeRobot's convention: time t runs
from 0 (noise) to 1 (data), x_t = t x0 + (1 - (1 - sigma_min) t) z, the model gives the velocity,
step i of K is at t = i / K, and the Euler step x + v / K goes by way of x0 = x + (1 - t) v.
Sources: Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (squared cosine), Song et al. 2021 (DDIM);
names and conventions (leading spacing, noise of the clipped sample not recomputed) are those of
diffusers, which Diffusion Policy uses.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from tts_policy.policy.validation import (
    Flag,
    Integer,
    Mismatch,
    Number,
    Spec,
    Text,
    checked,
    one_of,
)


def squared_cosine_alphas_cumprod(train_steps: int) -> Tensor:
    """Cumulative product of alphas, float64 [train_steps], betas clipped at 0.999."""

    def alpha_bar(fraction: float) -> float:
        return math.cos((fraction + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [
        min(1 - alpha_bar((i + 1) / train_steps) / alpha_bar(i / train_steps), 0.999)
        for i in range(train_steps)
    ]
    return torch.cumprod(1.0 - torch.tensor(betas, dtype=torch.float64), dim=0)


FLOW = 'flow'


@checked('scheduler')
class SchedulerSpec(Spec):
    """`kind` is 'ddpm', 'ddim' or 'flow'; `steps` denoising steps are taken of `train_steps`.

    beta_schedule: 'squaredcos_cap_v2', or 'linear', 'scaled_linear', 'sigmoid' between beta_start
    and beta_end. prediction: the model's output, 'epsilon' or 'sample'; with kind flow 'velocity',
    and the noise schedule's fields have no meaning. variance: of DDPM's noise, 'fixed_small',
    'fixed_small_log' (the same, as a clamped logarithm) or 'fixed_large'.
    clip: the clean sample is clipped to [-clip, clip]; 0 leaves it alone. steps_offset is added to
    the timesteps of DDPM and of DDIM; with set_alpha_to_one DDIM's last step ends at the clean
    sample.
    """

    kind: Annotated[Text, one_of('ddpm', 'ddim', 'flow')]
    steps: Annotated[Integer, Field(ge=1, le=10_000)]
    train_steps: Annotated[Integer, Field(ge=1, le=10_000)] = 100
    beta_schedule: Annotated[
        Text, one_of('squaredcos_cap_v2', 'linear', 'scaled_linear', 'sigmoid')
    ] = 'squaredcos_cap_v2'
    beta_start: Annotated[Number, Field(gt=0.0, lt=1.0)] = 0.0001
    beta_end: Annotated[Number, Field(gt=0.0, lt=1.0)] = 0.02
    prediction: Annotated[Text, one_of('epsilon', 'sample', 'velocity')] = 'epsilon'
    variance: Annotated[Text, one_of('fixed_small', 'fixed_small_log', 'fixed_large')] = (
        'fixed_small'
    )
    clip: Annotated[Number, Field(ge=0.0, le=1e6)] = 1.0
    steps_offset: Annotated[Integer, Field(ge=0)] = 0
    set_alpha_to_one: Flag = True

    @model_validator(mode='after')
    def _check(self) -> Self:
        if self.is_flow != (self.prediction == 'velocity'):
            allowed = "'velocity'" if self.is_flow else "'epsilon' or 'sample'"
            raise Mismatch('prediction', allowed, repr(self.prediction))
        if self.beta_start > self.beta_end:
            raise Mismatch(
                'beta_start', f'at most beta_end = {self.beta_end}', str(self.beta_start)
            )
        if self.is_flow:
            return self
        if self.steps > self.train_steps:
            raise Mismatch('steps', f'at most train_steps = {self.train_steps}', str(self.steps))
        if self.timesteps()[0] >= self.train_steps:
            within = f'timesteps below train_steps = {self.train_steps}'
            raise Mismatch('steps_offset', within, str(self.steps_offset))
        return self

    @property
    def is_flow(self) -> bool:
        """Whether this samples a flow-matching network, by Euler steps."""
        return self.kind == FLOW

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as they stand in model.yaml: what differs from the defaults."""
        required = ('kind', 'steps', 'train_steps')
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name in required or getattr(self, field.name) != field.default
        }

    def timesteps(self) -> list[int] | list[float]:
        """Timestep of every step, noisiest first: leading spacing, or i / K of a flow."""
        if self.is_flow:
            return [i / self.steps for i in range(self.steps)]
        stride = self.train_steps // self.steps
        return [i * stride + self.steps_offset for i in range(self.steps)][::-1]

    def alphas_cumprod(self) -> Tensor:
        """Cumulative product of alphas of the training schedule, [train_steps].

        Float64 for the squared cosine. The others are in single precision, as diffusers has them,
        and so are the coefficients made of them: where a step adds little noise that rounding is
        not small, and networks that come with these schedules were sampled with it.
        """
        if self.beta_schedule == 'squaredcos_cap_v2':
            return squared_cosine_alphas_cumprod(self.train_steps)
        low, high, steps = self.beta_start, self.beta_end, self.train_steps
        if self.beta_schedule == 'linear':
            betas = torch.linspace(low, high, steps, dtype=torch.float32)
        elif self.beta_schedule == 'scaled_linear':
            betas = torch.linspace(low**0.5, high**0.5, steps, dtype=torch.float32) ** 2
        else:
            ramp = torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float32))
            betas = ramp * (high - low) + low
        return torch.cumprod(1.0 - betas, dim=0)


class NoiseScheduler:
    """One sampler; coefficients are Python floats, folded once."""

    def __init__(self, spec: SchedulerSpec) -> None:
        self.spec = spec
        self.clip = spec.clip or math.inf
        if spec.is_flow:
            self._rows = [self._euler(t, 1 / spec.steps) for t in spec.timesteps()]
            return
        alphas_cumprod = spec.alphas_cumprod()
        rows = [self._coefficients(spec, alphas_cumprod, int(t)) for t in spec.timesteps()]
        self._rows = [tuple(float(value) for value in row) for row in rows]

    @staticmethod
    def _euler(t: float, step: float) -> tuple[float, ...]:
        """Same as `_coefficients` for a step of a flow from time t."""
        share = step / (1 - t)
        return (1.0, 1 - t, share, 1 - share, 0.0, 0.0)

    @staticmethod
    def _coefficients(
        spec: SchedulerSpec, alphas_cumprod: Tensor, t: int
    ) -> tuple[Tensor | float, ...]:
        """to_x0_x, to_x0_eps, next_x0, next_x, next_eps, next_noise of training timestep t.

        In the precision of the table.
        """
        stride = spec.train_steps // spec.steps
        now = alphas_cumprod[t]
        is_epsilon = spec.prediction == 'epsilon'
        to_x0 = (now**-0.5, -((1 - now) ** 0.5) / now**0.5) if is_epsilon else (0.0, 1.0)
        if spec.kind == 'ddim':
            final = alphas_cumprod.new_ones(()) if spec.set_alpha_to_one else alphas_cumprod[0]
            before = alphas_cumprod[t - stride] if t >= stride else final
            noise = (1 - before) ** 0.5
            if is_epsilon:
                return (*to_x0, before**0.5, 0.0, noise, 0.0)
            # eps = (x - sqrt(now) * prediction) / sqrt(1 - now)
            scale = noise / (1 - now) ** 0.5
            return (*to_x0, before**0.5, scale, -scale * now**0.5, 0.0)
        before = alphas_cumprod[t - stride] if t >= stride else alphas_cumprod.new_ones(())
        alpha = now / before
        small = ((1 - before) / (1 - now) * (1 - alpha)).clamp(min=1e-20)
        variance = 1 - alpha if spec.variance == 'fixed_large' else small
        x0 = before**0.5 * (1 - alpha) / (1 - now)
        x = alpha**0.5 * (1 - before) / (1 - now)
        return (*to_x0, x0, x, 0.0, variance**0.5 if t > 0 else 0.0)

    @property
    def coefficients(self) -> list[tuple[float, ...]]:
        """to_x0_x, to_x0_eps, next_x0, next_x, next_eps, next_noise of every step."""
        return list(self._rows)

    def noise_levels(self) -> list[tuple[float, float]]:
        """Factors of signal and noise in x before every step, (1, 0) after the last: [K + 1]."""
        times = self.spec.timesteps()
        if self.spec.is_flow:
            return [*((t, 1 - t) for t in times), (1.0, 0.0)]
        alphas_cumprod = self.spec.alphas_cumprod().tolist()
        shares = [alphas_cumprod[int(t)] for t in times]
        return [*((share**0.5, (1 - share) ** 0.5) for share in shares), (1.0, 0.0)]

    @property
    def needs_noise(self) -> bool:
        """Whether a step adds noise of its own (DDPM does, DDIM does not)."""
        return self.spec.kind == 'ddpm'

    def step(self, i: int, x: Tensor, eps: Tensor, noise: Tensor | None) -> Tensor:
        """One denoising step: x [..., T, A] -> the less noisy x; `noise` is z_i [..., T, A].

        eps is the model's prediction. DDPM reads `noise`, DDIM ignores it.
        """
        to_x0_x, to_x0_eps, next_x0, next_x, next_eps, next_noise = self._rows[i]
        x0 = (to_x0_x * x + to_x0_eps * eps).clamp(-self.clip, self.clip)
        if not self.needs_noise:
            return next_x0 * x0 + next_x * x + next_eps * eps
        assert noise is not None, 'a DDPM step needs its noise'
        return next_x0 * x0 + next_x * x + next_noise * noise


def flow_lesson(x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy x_t [B, T, A], times t [B] and velocities [B, T, A] of clean actions x0 [B, T, A].

    Times are 0.999 (1 - u) with u ~ Beta(1.5, 1), denser toward the noise.
    Sources: Lipman et al., "Flow Matching for Generative Modeling" (2023), with sigma_min = 0;
    distribution of times: Black et al., "pi0" (2024).
    """
    uniform = torch.rand(len(x0), generator=generator)
    t = 0.999 * (1 - uniform ** (2 / 3))
    noise = torch.randn(x0.shape, generator=generator)
    share = t[:, None, None]
    return share * x0 + (1 - share) * noise, t, x0 - noise


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
