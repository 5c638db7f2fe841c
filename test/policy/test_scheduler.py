# SPDX-License-Identifier: Apache-2.0
"""Noise schedulers against their textbook formulas, written out separately."""

from __future__ import annotations

import math

import pytest
import torch

from tts_policy.policy.scheduler import (
    NoiseScheduler,
    SchedulerSpec,
    TrainingNoise,
    squared_cosine_alphas_cumprod,
)


def _alphas_cumprod(t: int) -> float:
    def bar(u: float) -> float:
        return math.cos((u / 100 + 0.008) / 1.008 * math.pi / 2) ** 2

    product = 1.0
    for s in range(t + 1):
        product *= 1 - min(1 - bar(s + 1) / bar(s), 0.999)
    return product


def test_squared_cosine_schedule() -> None:
    table = squared_cosine_alphas_cumprod(100)
    assert table.tolist() == pytest.approx([_alphas_cumprod(t) for t in range(100)], rel=1e-9)


def test_timesteps_are_leading_spaced_and_noisiest_first() -> None:
    assert SchedulerSpec('ddim', 10).timesteps() == [90, 80, 70, 60, 50, 40, 30, 20, 10, 0]
    assert SchedulerSpec('ddpm', 100).timesteps() == list(range(99, -1, -1))
    assert SchedulerSpec('ddim', 16).timesteps()[:2] == [90, 84]


@pytest.mark.parametrize('i', [0, 40, 98, 99])
def test_ddpm_step_is_the_clipped_posterior(i: int) -> None:
    scheduler = NoiseScheduler(SchedulerSpec('ddpm', 100))
    generator = torch.Generator().manual_seed(i)
    x, eps, z = (torch.randn(1, 4, 2, generator=generator) for _ in range(3))
    t = 99 - i
    now = _alphas_cumprod(t)
    before = _alphas_cumprod(t - 1) if t else 1.0
    beta = 1 - now / before
    x0 = ((x - math.sqrt(1 - now) * eps) / math.sqrt(now)).clamp(-1, 1)
    mean = math.sqrt(before) * beta / (1 - now) * x0
    mean = mean + math.sqrt(1 - beta) * (1 - before) / (1 - now) * x
    sigma = math.sqrt((1 - before) / (1 - now) * beta)
    assert torch.allclose(scheduler.step(i, x, eps, z), mean + sigma * z, atol=1e-5)


@pytest.mark.parametrize('i', [0, 5, 9])
def test_ddim_step_is_the_deterministic_update(i: int) -> None:
    scheduler = NoiseScheduler(SchedulerSpec('ddim', 10))
    generator = torch.Generator().manual_seed(i)
    x, eps = (torch.randn(1, 4, 2, generator=generator) for _ in range(2))
    t = 90 - 10 * i
    now = _alphas_cumprod(t)
    before = _alphas_cumprod(t - 10) if t else 1.0
    x0 = ((x - math.sqrt(1 - now) * eps) / math.sqrt(now)).clamp(-1, 1)
    expected = math.sqrt(before) * x0 + math.sqrt(1 - before) * eps
    assert torch.allclose(scheduler.step(i, x, eps, None), expected, atol=1e-5)


@pytest.mark.parametrize('spec', [SchedulerSpec('ddpm', 100), SchedulerSpec('ddim', 10)])
def test_an_exact_denoiser_recovers_the_clean_action(spec: SchedulerSpec) -> None:
    clean = torch.linspace(-0.9, 0.9, 8).view(1, 4, 2)
    scheduler, noise = NoiseScheduler(spec), TrainingNoise(100)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(clean.shape, generator=generator)
    for i, t in enumerate(spec.timesteps()):
        eps = (x - noise.signal[t] * clean) / noise.noise[t]
        x = scheduler.step(i, x, eps, torch.randn(clean.shape, generator=generator))
    assert torch.allclose(x, clean, atol=1e-4)


@pytest.mark.parametrize(
    ('kind', 'steps', 'reason'),
    [
        ('euler', 10, "kind: expected 'ddpm' or 'ddim' or 'flow', got 'euler'"),
        ('ddim', 0, 'steps: expected at least 1, got 0'),
        ('ddim', 101, 'steps: expected at most train_steps = 100, got 101'),
    ],
)
def test_impossible_schedulers_are_refused(kind: str, steps: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SchedulerSpec(kind, steps)
