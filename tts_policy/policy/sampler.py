# SPDX-License-Identifier: Apache-2.0
"""A sampler of a bundle: a scheduler and how sparsely it may run."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator
from typing_extensions import Self

from tts_policy.policy.schedulers.scheduler import SchedulerSpec
from tts_policy.policy.validation import Flag, Integer, Mismatch, Number, Spec, checked


@checked('sampler')
class SamplerSpec(Spec):
    """How chunks are sampled.

    force_first_step: every block of step 0 is computed, so that the pruner can run beside it.
    hold_noise: initial and per-step noise stay the same for all ticks of an episode; otherwise the
    features of an earlier tick are of little use.
    temperature: factor of all noise, in [0, 1]. At 0 a chunk depends on its observation alone
    (low-temperature sampling, Ajay et al. 2023).
    max_rollout_age: a cached feature older than this many ticks is not reused.
    """

    scheduler: SchedulerSpec
    force_first_step: Flag = True
    hold_noise: Flag = True
    temperature: Annotated[Number, Field(ge=0.0, le=1.0)] = 1.0
    max_rollout_age: Annotated[Integer, Field(ge=1, le=10_000)] = 16
    recommended_sparsity: Annotated[Number, Field(ge=0.0)] = 0.0

    @model_validator(mode='after')
    def _check_sparsity(self) -> Self:
        if self.recommended_sparsity > self.max_sparsity:
            most = f'at most {self.max_sparsity:.4g}'
            raise Mismatch('recommended_sparsity', most, str(self.recommended_sparsity))
        return self

    @property
    def max_sparsity(self) -> float:
        """Largest share of cells that can be reused: 1 - 1/K.

        A forced step 0 takes the rest. Without it the limit is the same, because a chunk that
        computes nothing would not depend on the observation.
        """
        return 1.0 - 1.0 / self.scheduler.steps

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as they stand in model.yaml; of the scheduler what is not default."""
        return {**super().to_dict(), 'scheduler': self.scheduler.to_dict()}


# Samplers of a policy that is trained here, by the objective it is trained for.
DIFFUSION_SAMPLERS = {
    'ddim10': SamplerSpec(
        scheduler=SchedulerSpec('ddim', 10), force_first_step=False, recommended_sparsity=0.8
    ),
    'ddpm100': SamplerSpec(
        scheduler=SchedulerSpec('ddpm', 100), force_first_step=True, recommended_sparsity=0.95
    ),
}
FLOW_SAMPLERS = {
    'flow10': SamplerSpec(
        scheduler=SchedulerSpec('flow', 10, prediction='velocity'),
        force_first_step=False,
        recommended_sparsity=0.8,
    ),
}
