# SPDX-License-Identifier: Apache-2.0
"""Plans that a search may start from: placed passes, denser versions of a plan, and prior plans.

*Placed passes* are a static schedule whose whole passes move to the steps that matter most.
Between passes every block keeps its last feature. At which steps a few passes happen matters more
than which single cells are exchanged later, and no exchange of cells finds it, since a pass that
moves by one step is many cells that are all needed at both places.

*Refinement* adds whole passes between those that a plan has. A cell computed alone among reused
ones mixes features of different noise levels; many such cells, each chosen by what it promises by
itself, make a plan worse. One more whole pass is rarely worse. Cells that do not suffice for a
pass are left to the search.

*Prior plans* come from a pruner that exists, possibly of another sampler. Samplers of one network
visit the same noise levels, some more densely, and what is worth computing at a noise level hardly
depends on the number of steps. So plans are carried over by noise level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tts_policy.policy.plan import Plan, Reuse, make_plan, static_steps, static_time
from tts_policy.policy.pruner import Pruner
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.train.reuse_gradient import with_sources

# The first stride of the search for passes, as a share of the steps.
REACH = 0.16
# A step is one of a plan's passes if it computes this share of what its densest step does.
PASS_SHARE = 0.5


def placed_passes(
    error: Callable[[list[int]], float], steps: int, count: int, force_first_step: bool
) -> tuple[list[int], float]:
    """Return `count` steps out of `steps` whose error is a local minimum, and that error.

    error: of whole passes at steps in ascending order. The search begins with a static schedule
    and accepts only improvements; a forced first step stays where it is. It is a pattern search by
    coordinates (Hooke and Jeeves 1961): every pass moves by a stride while that helps; when no
    pass moves any more, the stride is halved.
    """
    passes = static_steps(steps, count).tolist()
    best = error(passes)
    stride = max(1, round(REACH * steps))
    while stride:
        before = best
        for index in range(int(force_first_step), len(passes)):
            for change in (stride, -stride):
                while (moved := _moved(passes, index, change, steps)) is not None:
                    trial = error(moved)
                    if trial >= best:
                        break
                    passes, best = moved, trial
        if best == before:
            stride //= 2
    return passes, best


def _moved(passes: list[int], index: int, change: int, steps: int) -> list[int] | None:
    """Move one pass; return None if it would pass a neighbour or leave the steps."""
    before = passes[index - 1] if index else -1
    after = passes[index + 1] if index + 1 < len(passes) else steps
    step = passes[index] + change
    return [*passes[:index], step, *passes[index + 1 :]] if before < step < after else None


def refinement_steps(plan: Plan) -> list[int]:
    """Return the steps that a plan [K, N] does not fully compute, in the order to complete them.

    A new pass halves the widest gap between passes, on the time scale on which a static schedule
    is evenly spaced. The gaps before the first and after the last pass count half, because the
    plan chose to reuse features there. The cells that one of the plan's own passes lacks were left
    out on purpose as well; they come after as many new passes.
    """
    computed = plan == Reuse.COMPUTE
    share = computed.mean(axis=1)
    own = np.flatnonzero(computed.any(axis=1) & (share >= PASS_SHARE * share.max())).tolist()
    time = static_time(len(plan))
    distance = abs(time[:, None] - time[own]).min(axis=1, initial=1.0)
    passes = list(own)
    while len(passes) < len(plan):
        gap = distance.copy()
        if passes:
            gap[: min(passes)] /= 2
            gap[max(passes) :] /= 2
        gap[passes] = -1.0
        passes.append(int(gap.argmax()))
        distance = np.minimum(distance, abs(time - time[passes[-1]]))
    new = passes[len(own) :]
    order = [*new[: len(own)], *own, *new[len(own) :]]
    return [step for step in order if share[step] < 1.0]


def refined(plan: Plan, cells: int) -> Plan:
    """Return the plan with as many more whole passes as a total of `cells` suffices for."""
    dense, left = plan.copy(), cells - int((plan == Reuse.COMPUTE).sum())
    for step in refinement_steps(plan):
        left -= int((plan[step] != Reuse.COMPUTE).sum())
        if left < 0:
            break
        dense[step] = Reuse.COMPUTE
    return dense


def carried_over(
    plan: Plan,
    levels: NDArray[np.floating],
    new_levels: NDArray[np.floating],
    kinds: NDArray[np.int64],
) -> Plan:
    """Return a plan [K', N] for new noise levels [K'], given a plan [K, N] for levels [K].

    Every computed step is computed at the nearest new level only. The other steps reuse as the
    nearest old step does, or by TIMESTEP where that one is computed.
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
    """Constant plans of a pruner of `sampler`; they do not depend on the observation."""

    pruner: Pruner
    sampler: SamplerSpec

    def plans(self, cells: int, sampler: SamplerSpec, kinds: NDArray[np.int64]) -> list[Plan]:
        """Return plans of `sampler` that compute about `cells` cells, a forced step included.

        One is from the table for that sparsity or the next denser one, another from the next
        sparser one: refined, it may be better than one searched for exactly this sparsity.
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
        # With fewer cells, fewer of them may belong to the first step.
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
