# SPDX-License-Identifier: Apache-2.0
"""Settings in the checkpoints of other projects; diffusers' schedulers as our samplers."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from tts_policy.convert.restricted_pickle import CheckpointError
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.policy.schedulers.scheduler import FLOW, SchedulerSpec
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

FEW_STEPS = 10
# Shares of the plan that the static schedule reuses until a pruner is trained.
RECOMMENDED_DDPM, RECOMMENDED_OTHERS = 0.8, 0.5
_KINDS = {'DDPMScheduler': 'ddpm', 'DDIMScheduler': 'ddim'}
_Settings = TypeVar('_Settings', bound=Spec)
# Class that a mapping configures, as Hydra names it.
Target = Annotated[Text, Field(alias='_target_')]


def read_settings(kind: type[_Settings], data: Any, path: str) -> _Settings:
    """Settings of a mapping at `path`; raises CheckpointError naming the field that is wrong."""
    try:
        return kind.from_dict(data)
    except Mismatch as error:
        thing = f'{path}{error.thing.removeprefix(kind.NAME)}'
        raise CheckpointError(str(Mismatch(thing, error.expected, error.got))) from None


@checked('noise_scheduler', kw_only=True)
class NoiseScheduler(Spec):
    """Configuration of a scheduler of diffusers."""

    target: Target
    num_train_timesteps: Integer = 1000
    beta_start: Number = 0.0001
    beta_end: Number = 0.02
    beta_schedule: Text = 'linear'
    variance_type: Text = 'fixed_small'
    clip_sample: Flag = True
    clip_sample_range: Number = 1.0
    prediction_type: Text = 'epsilon'
    set_alpha_to_one: Flag = True
    steps_offset: Integer = 0
    timestep_spacing: Annotated[Text, one_of('leading')] = 'leading'
    thresholding: Literal[False] = False
    trained_betas: None = None

    def samplers(self, steps: int | None) -> dict[str, SamplerSpec]:
        """Samplers by name, the checkpoint's own first.

        A policy trained with the DDPM schedule can be sampled by DDIM in few steps: that is added.
        Raises CheckpointError or ValueError for schedules that are not known here.
        """
        target = self.target.rpartition('.')[2]
        if target not in _KINDS:
            raise CheckpointError(f'noise_scheduler: expected {" or ".join(_KINDS)}, got {target}')
        own = SchedulerSpec(
            kind=_KINDS[target],
            steps=self.num_train_timesteps if steps is None else steps,
            train_steps=self.num_train_timesteps,
            beta_schedule=self.beta_schedule,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            prediction=self.prediction_type,
            variance=self.variance_type,
            clip=self.clip_sample_range if self.clip_sample else 0.0,
            steps_offset=self.steps_offset,
            set_alpha_to_one=self.set_alpha_to_one,
        )
        samplers = {f'{own.kind}{own.steps}': _sampler(own)}
        if own.kind == 'ddpm' and own.steps > FEW_STEPS:
            few = replace(own, kind='ddim', steps=FEW_STEPS, variance='fixed_small')
            samplers[f'ddim{FEW_STEPS}'] = _sampler(few)
        return samplers


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
