# SPDX-License-Identifier: Apache-2.0
"""Plans of a pruner that exists as starts of a search, for another sampler as well.

Samplers of one network visit the same noise levels, some more densely. What is worth computing is
much the same at a level however many steps there are, so a plan is carried over by level.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tts_policy.policy.plan import Plan, Reuse, make_plan
from tts_policy.policy.pruner import Pruner
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.train.reuse_gradient import with_sources


def carried_over(
    plan: Plan,
    levels: NDArray[np.floating],
    new_levels: NDArray[np.floating],
    kinds: NDArray[np.int64],
) -> Plan:
    """Plan [K', N] for other noise levels [K'] of a plan [K, N] for levels [K].

    Every computed step is computed at the nearest of the new levels, and there alone. The other
    steps reuse as the nearest old one does, TIMESTEP where that is a computed one.
    """
    distance = np.abs(new_levels[:, None] - levels[None, :])
    nearest_old, nearest_new = distance.argmin(axis=1), distance.argmin(axis=0)
    reused = plan[nearest_old]
    made = np.where(reused == Reuse.COMPUTE, np.int8(Reuse.TIMESTEP), reused)
    for old, new in enumerate(nearest_new):
        made[new, plan[old] == Reuse.COMPUTE] = Reuse.COMPUTE
    return with_sources(made, kinds)


@dataclass(frozen=True)
class PriorPlans:
    """Constant plans of a pruner of `sampler`; the observation is not asked."""

    pruner: Pruner
    sampler: SamplerSpec

    def plans(self, cells: int, sampler: SamplerSpec, kinds: NDArray[np.int64]) -> list[Plan]:
        """Plans of `sampler` that compute about `cells` cells, a forced step's among them.

        One is of the table for that sparsity, or the next denser one, one of the next sparser: a
        plan refined from there may be better than one searched for the very sparsity.
        """
        known = self.pruner.sparsities
        denser = [s for s in known if round((1 - s) * self._size) >= cells]
        sparser = [s for s in known if s not in denser]
        return [self._of_table(s, cells, sampler, kinds) for s in (*denser[-1:], *sparser[:1])]

    @property
    def _size(self) -> int:
        return self.pruner.spec.steps * self.pruner.spec.blocks

    def _sparsity(self, cells: int) -> float:
        return min(max(0.0, 1 - cells / self._size), self.sampler.max_sparsity)

    def _of_table(
        self, known: float, cells: int, sampler: SamplerSpec, kinds: NDArray[np.int64]
    ) -> Plan:
        plan = self._carried_over(known, cells, sampler, kinds)
        if not sampler.force_first_step:
            return plan
        # With fewer cells fewer of the first step may be among them.
        spare = 0
        while (missing := int((plan[0] != Reuse.COMPUTE).sum())) > spare:
            spare = missing
            plan = self._carried_over(known, cells - spare, sampler, kinds)
        plan[0] = Reuse.COMPUTE
        return plan

    def _carried_over(
        self, known: float, cells: int, sampler: SamplerSpec, kinds: NDArray[np.int64]
    ) -> Plan:
        logits = self.pruner.table(known).detach().numpy()
        everywhere = np.ones((self.pruner.spec.steps, self.pruner.spec.blocks), bool)
        sparsity, forced = self._sparsity(cells), self.sampler.force_first_step
        own = make_plan(logits, sparsity, everywhere, forced, kinds)
        levels, new_levels = (
            np.array(spec.scheduler.timesteps(), float) for spec in (self.sampler, sampler)
        )
        return carried_over(own, levels, new_levels, kinds)
