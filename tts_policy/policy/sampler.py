# SPDX-License-Identifier: Apache-2.0
"""A sampler of a bundle: a noise scheduler and how sparsely it may be run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tts_policy.policy.field_types import check_field_types
from tts_policy.policy.scheduler import SchedulerSpec


@dataclass(frozen=True)
class SamplerSpec:
    """How chunks are sampled.

    force_first_step: every block of step 0 is computed, so that the pruner can overlap with it.
    hold_noise: initial and per-step noise stay the same for the ticks of an episode; without it
    the features of an earlier tick are of little use (design, section 3).
    temperature: factor of all noise, in [0, 1]. At 0 a chunk depends on its observation alone
    (low-temperature sampling, Ajay et al. 2023).
    max_rollout_age: a cached feature older than this many ticks is not reused.
    """

    scheduler: SchedulerSpec
    force_first_step: bool = True
    hold_noise: bool = True
    temperature: float = 1.0
    max_rollout_age: int = 16
    recommended_sparsity: float = 0.0

    def __post_init__(self) -> None:
        """Refuse impossible settings; raises ValueError naming the field."""
        check_field_types('sampler', self)
        if not 1 <= self.max_rollout_age <= 10_000:
            raise ValueError(f'max_rollout_age must be in [1, 10000], got {self.max_rollout_age}')
        if not 0.0 <= self.temperature <= 1.0:
            raise ValueError(f'temperature must be in [0, 1], got {self.temperature}')
        if not 0.0 <= self.recommended_sparsity <= self.max_sparsity:
            raise ValueError(
                f'recommended_sparsity must be in [0, {self.max_sparsity:.4g}], '
                f'got {self.recommended_sparsity}'
            )

    @property
    def max_sparsity(self) -> float:
        """Largest share of cells that can be reused: 1 - 1/K with step 0 forced.

        With step 0 free one step's worth of cells is kept all the same: a chunk that computes
        nothing would not depend on the observation.
        """
        return 1.0 - 1.0 / self.scheduler.steps

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as they stand in model.yaml."""
        return {**asdict(self), 'scheduler': self.scheduler.to_dict()}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> SamplerSpec:
        """Inverse of `to_dict`; raises ValueError or TypeError for malformed data."""
        data = dict(data)
        return SamplerSpec(SchedulerSpec(**data.pop('scheduler')), **data)
