# SPDX-License-Identifier: Apache-2.0
"""Noise schedulers against their textbook formulas, written out separately."""

from __future__ import annotations

import math

import pytest
import torch

from tts_policy.policy.schedulers.flow import flow_targets
from tts_policy.policy.schedulers.noise_schedule import (
    TrainingNoise,
    squared_cosine_alphas_cumprod,
)
from tts_policy.policy.schedulers.scheduler import SCHEDULERS, SchedulerSpec


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
    scheduler = SchedulerSpec('ddpm', 100).make()
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
    assert torch.allclose(scheduler.step(i, x, eps, z)[0], mean + sigma * z, atol=1e-5)


@pytest.mark.parametrize('i', [0, 5, 9])
def test_ddim_step_is_the_deterministic_update(i: int) -> None:
    scheduler = SchedulerSpec('ddim', 10).make()
    generator = torch.Generator().manual_seed(i)
    x, eps = (torch.randn(1, 4, 2, generator=generator) for _ in range(2))
    t = 90 - 10 * i
    now = _alphas_cumprod(t)
    before = _alphas_cumprod(t - 10) if t else 1.0
    x0 = ((x - math.sqrt(1 - now) * eps) / math.sqrt(now)).clamp(-1, 1)
    expected = math.sqrt(before) * x0 + math.sqrt(1 - before) * eps
    assert torch.allclose(scheduler.step(i, x, eps)[0], expected, atol=1e-5)


@pytest.mark.parametrize(('kind', 'steps'), [('ddpm', 100), ('ddim', 10), ('dpm_solver', 10)])
def test_an_exact_denoiser_recovers_the_clean_action(kind: str, steps: int) -> None:
    spec = SchedulerSpec(kind, steps)
    clean = torch.linspace(-0.9, 0.9, 8).view(1, 4, 2)
    scheduler, noise = spec.make(), TrainingNoise(100)
    generator = torch.Generator().manual_seed(0)
    x, x0 = torch.randn(clean.shape, generator=generator), None
    for i, t in enumerate(spec.timesteps()):
        eps = (x - noise.signal[t] * clean) / noise.noise[t]
        z = torch.randn(clean.shape, generator=generator)
        x, x0 = scheduler.step(i, x, eps, z, x0)
    assert torch.allclose(x, clean, atol=1e-4)


@pytest.mark.parametrize('schedule', ['squaredcos_cap_v2', 'linear', 'scaled_linear'])
@pytest.mark.parametrize('prediction', ['epsilon', 'sample'])
@pytest.mark.parametrize('steps', [1, 2, 5, 10, 25])
def test_dpm_solver_is_that_of_diffusers(schedule: str, prediction: str, steps: int) -> None:
    diffusers = pytest.importorskip('diffusers', reason='requirements/bench.txt is not installed')
    spec = SchedulerSpec(
        'dpm_solver', steps, beta_schedule=schedule, prediction=prediction, clip=0.0
    )
    theirs = diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=100,
        beta_schedule=schedule,
        beta_start=spec.beta_start,
        beta_end=spec.beta_end,
        prediction_type=prediction,
        algorithm_type='dpmsolver++',
        solver_order=2,
        solver_type='midpoint',
        lower_order_final=True,
    )
    theirs.set_timesteps(steps)
    assert theirs.timesteps.tolist() == spec.timesteps()
    scheduler, generator = spec.make(), torch.Generator().manual_seed(0)
    x, x0 = torch.randn(1, 4, 2, generator=generator), None
    expected = x.double()
    for i, t in enumerate(theirs.timesteps):
        # A smooth network, in double precision for them: it may not magnify rounding.
        expected = theirs.step(torch.sin(expected), t, expected).prev_sample
        x, x0 = scheduler.step(i, x, torch.sin(x), previous_x0=x0)
    assert ((x - expected).abs() / expected.abs().clamp(min=1)).max() < 2e-4


@pytest.mark.parametrize(
    ('kind', 'steps', 'reason'),
    [
        ('euler', 10, f"kind: expected {' or '.join(map(repr, sorted(SCHEDULERS)))}, got 'euler'"),
        ('ddim', 0, 'steps: expected at least 1, got 0'),
        ('ddim', 101, 'steps: expected at most train_steps = 100, got 101'),
        ('dpm_solver', 100, 'steps: expected fewer than train_steps = 100, .* got 100'),
    ],
)
def test_impossible_schedulers_are_refused(kind: str, steps: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SchedulerSpec(kind, steps)


def test_euler_steps_of_the_true_velocity_end_at_the_data() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(4, 8, 3, generator=generator) * 1.6 - 0.8
    x = noise = torch.randn(4, 8, 3, generator=generator)
    scheduler = SchedulerSpec('flow', 7, prediction='velocity').make()
    for step, t in enumerate(scheduler.spec.timesteps()):
        assert (x - (t * data + (1 - t) * noise)).abs().max() < 1e-5
        x, _ = scheduler.step(step, x, data - noise)
    assert (x - data).abs().max() < 1e-5
    assert not scheduler.needs_noise


def test_without_clip_a_flow_step_adds_the_velocity_and_with_it_the_data_is_bounded() -> None:
    x, velocity = torch.randn(2, 1, 8, 3)
    free, bound = (
        SchedulerSpec('flow', 4, prediction='velocity', clip=c).make() for c in (0.0, 0.5)
    )
    for step in range(4):
        assert torch.allclose(free.step(step, x, velocity)[0], x + velocity / 4, atol=1e-5)
    assert bound.step(3, x, 100 * velocity)[0].abs().max() <= 0.5


def test_targets_of_a_flow_lie_on_the_line_from_noise_to_data() -> None:
    data = torch.randn(500, 2, 3)
    noisy, t, velocity = flow_targets(data, torch.Generator().manual_seed(0))
    assert torch.allclose(noisy + (1 - t)[:, None, None] * velocity, data, atol=1e-5)
    assert t.min() >= 0.0 and t.max() <= 0.999
    # Mean of 0.999 (1 - u), u ~ Beta(1.5, 1), is 0.4.
    assert t.mean().item() == pytest.approx(0.4, abs=0.04) and not math.isclose(t.mean(), 0.5)


def test_a_flow_predicts_velocity() -> None:
    with pytest.raises(ValueError, match="prediction: expected 'velocity', got 'epsilon'"):
        SchedulerSpec('flow', 5)
