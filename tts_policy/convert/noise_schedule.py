# SPDX-License-Identifier: Apache-2.0
"""Settings of diffusers' DDPM and DDIM schedulers as samplers of a bundle."""

from __future__ import annotations

from dataclasses import replace

from tts_policy.convert.configuration import Configuration
from tts_policy.convert.restricted_pickle import CheckpointError
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.policy.schedulers.scheduler import FLOW, SchedulerSpec

FEW_STEPS = 10
# Shares of the plan that the static schedule reuses until a pruner is trained.
RECOMMENDED_DDPM, RECOMMENDED_OTHERS = 0.8, 0.5


def read_scheduler(settings: Configuration, steps: int) -> SchedulerSpec:
    """Scheduler of a configuration; raises CheckpointError or ValueError for what is unknown."""
    settings.allow(
        '_target_ num_train_timesteps beta_start beta_end beta_schedule variance_type clip_sample '
        'clip_sample_range prediction_type set_alpha_to_one steps_offset timestep_spacing '
        'trained_betas thresholding'
    )
    kinds = {'DDPMScheduler': 'ddpm', 'DDIMScheduler': 'ddim'}
    target = settings.text('_target_').rpartition('.')[2]
    if target not in kinds:
        raise CheckpointError(f'noise_scheduler must be {" or ".join(kinds)}, got {target}')
    if settings.text('timestep_spacing', 'leading') != 'leading':
        raise CheckpointError(
            f"timestep_spacing must be 'leading', got {settings.text('timestep_spacing')!r}"
        )
    if settings.flag('thresholding', False):
        raise CheckpointError('thresholding must be false, got true')
    if 'trained_betas' in settings.given:
        raise CheckpointError('trained_betas must be null, got values')
    clip = settings.number('clip_sample_range', 1.0)
    return SchedulerSpec(
        kind=kinds[target],
        steps=steps,
        train_steps=settings.integer('num_train_timesteps', 1000),
        beta_schedule=settings.text('beta_schedule', 'linear'),
        beta_start=settings.number('beta_start', 0.0001),
        beta_end=settings.number('beta_end', 0.02),
        prediction=settings.text('prediction_type', 'epsilon'),
        variance=settings.text('variance_type', 'fixed_small'),
        clip=clip if settings.flag('clip_sample', True) else 0.0,
        steps_offset=settings.integer('steps_offset', 0),
        set_alpha_to_one=settings.flag('set_alpha_to_one', True),
    )


def read_samplers(policy: Configuration) -> tuple[dict[str, SamplerSpec], int]:
    """Samplers by name, the checkpoint's own first, and the length of the training schedule.

    A policy trained with the DDPM schedule can be sampled by DDIM with few steps: that is added.
    """
    settings = policy.section('noise_scheduler')
    train_steps = settings.integer('num_train_timesteps', 1000)
    own = read_scheduler(settings, policy.integer('num_inference_steps', train_steps))
    samplers = {f'{own.kind}{own.steps}': _sampler(own)}
    if own.kind == 'ddpm' and own.steps > FEW_STEPS:
        few = replace(own, kind='ddim', steps=FEW_STEPS, variance='fixed_small')
        samplers[f'ddim{FEW_STEPS}'] = _sampler(few)
    return samplers, train_steps


def flow_samplers(steps: int) -> dict[str, SamplerSpec]:
    """Euler samplers of a flow-matching policy by name: of so many steps, and of few."""
    counts = dict.fromkeys((steps, min(steps, FEW_STEPS)))
    return {
        f'{FLOW}{count}': _sampler(SchedulerSpec(FLOW, count, prediction='velocity', clip=0.0))
        for count in counts
    }


def _sampler(scheduler: SchedulerSpec) -> SamplerSpec:
    wanted = RECOMMENDED_DDPM if scheduler.kind == 'ddpm' else RECOMMENDED_OTHERS
    return SamplerSpec(scheduler, recommended_sparsity=min(wanted, 1.0 - 1.0 / scheduler.steps))
