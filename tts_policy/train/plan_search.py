# SPDX-License-Identifier: Apache-2.0
"""Search of a reuse plan: the gradient proposes, a trial decides.

A plan is discrete. A small step along a straight-through gradient changes nothing, and a large one
flips many cells at once, where the gradient is no longer valid. So the first-order change of every
single flip ranks the candidates, and the best are tried one by one. Those that helped are applied
together if that helps on the batch; otherwise fewer of them are. The cost of dropping a computed
cell is far from linear, so it is always measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tts_policy.policy.plan import Plan, Reuse
from tts_policy.train.plan_budget import PlanBudget, apart
from tts_policy.train.plan_starts import refinement_steps
from tts_policy.train.reuse_gradient import Flip, ReuseGradient, flipped, reuse_gradient
from tts_policy.train.sequences import PlanErrors, SequenceBatch

REUSE_CLASSES = (Reuse.FORWARD, Reuse.TIMESTEP, Reuse.ROLLOUT)


@dataclass(frozen=True)
class SearchSpec:
    """Settings of a search.

    trials: flips tried one by one in a step, each for classes, additions and removals;
    largest_change: flips that promise more than this are beyond what the gradient can predict;
    forget_after: steps after which a flip that did not help may be tried again;
    largest_swap: most cells exchanged at once; growth: share of cells added at once to a plan that
    has fewer than its budget.
    """

    trials: int = 12
    largest_change: float = 0.01
    forget_after: int = 15
    largest_swap: int = 16
    growth: float = 0.2


class PlanSearch:
    """Improves a plan [K, N] within a budget.

    Cells of `forced` are always computed. `removal_cost` [K, N] is the measured harm of reusing a
    computed cell, NaN where unknown, `removal_class` the class it would take.
    """

    def __init__(
        self,
        errors: PlanErrors,
        plan: Plan,
        budget: PlanBudget,
        forced: NDArray[np.bool_],
        spec: SearchSpec,
    ) -> None:
        self._errors, self._spec = errors, spec
        self.plan, self.budget, self._forced = plan, budget, forced
        self.removal_cost = np.full(plan.shape, np.nan)
        self.removal_class = np.full(plan.shape, Reuse.TIMESTEP, np.int8)
        self._failed_in = np.full((*plan.shape, len(Reuse)), -spec.forget_after)
        self._swap = 4
        self._step = 0

    def state(self) -> dict[str, Any]:
        """Return everything that `restore` needs to continue."""
        return {
            'plan': torch.from_numpy(self.plan),
            'removal_cost': torch.from_numpy(self.removal_cost),
            'removal_class': torch.from_numpy(self.removal_class),
            'failed_in': torch.from_numpy(self._failed_in),
            'swap': self._swap,
            'step': self._step,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state`."""
        self.plan = state['plan'].numpy()
        self.removal_cost = state['removal_cost'].numpy()
        self.removal_class = state['removal_class'].numpy()
        self._failed_in = state['failed_in'].numpy()
        self._swap, self._step = state['swap'], state['step']

    @property
    def computed(self) -> int:
        """Number of computed cells."""
        return int((self.plan == Reuse.COMPUTE).sum())

    @property
    def affordable(self) -> bool:
        """Whether the plan is within the budget."""
        return self.budget.affords(self.plan)

    def grow(self, batch: SequenceBatch) -> None:
        """Add the most promising computed cells, towards the budget."""
        gradient = reuse_gradient(self._errors, batch, self.plan)
        missing = self.budget.cells - self.computed
        count = min(missing, max(1, round(self._spec.growth * self.computed)))
        flips = gradient.flips((Reuse.COMPUTE,))
        added = self.budget.additions(flips, count, self.budget.room(self.plan))
        self.plan = flipped(self.plan, self._errors.kinds, *added)

    def shrink(self, batch: SequenceBatch) -> bool:
        """Remove the computed cells that seem to matter least, towards the budget.

        Returns whether there were any to remove.
        """
        gradient = reuse_gradient(self._errors, batch, self.plan)
        excess = self.computed - self.budget.cells
        removable = (self.plan == Reuse.COMPUTE) & ~self._forced
        if excess <= 0:
            # The number of cells is within the budget, but their cost is not.
            removable &= self.budget.expensive
        flips = [self._removal(gradient, int(i), int(b)) for i, b in np.argwhere(removable)]
        count = max(1, (excess + 1) // 2)
        removed = apart(sorted(flips, key=lambda flip: abs(flip.change)), count)
        self.plan = flipped(self.plan, self._errors.kinds, *removed)
        return bool(removed)

    def step(
        self, batch: SequenceBatch, sample: SequenceBatch, random: np.random.Generator
    ) -> tuple[float, float]:
        """Try to improve on a batch; return its error before and after.

        The gradient and the trials of single flips use `sample`, a part of the batch.
        """
        self._step += 1
        gradient = reuse_gradient(self._errors, sample, self.plan)
        before = self._error(batch)
        error = self._change_classes(gradient, batch, sample, before, random)
        base = self._error(sample)
        additions = self._try(gradient.flips((Reuse.COMPUTE,)), sample, base, random)
        self._measure_removals(gradient, sample, base, random)
        return before, self._exchange(additions, batch, error)

    def _error(self, batch: SequenceBatch, plan: Plan | None = None) -> float:
        return self._errors.mean(batch, self.plan if plan is None else plan)

    def _try(
        self,
        flips: Sequence[Flip],
        sample: SequenceBatch,
        base: float,
        random: np.random.Generator,
    ) -> list[Flip]:
        """Return the promising flips that helped, with measured changes, best first."""
        spec, best, cells = self._spec, [], set()
        for flip in flips:
            recent = self._step - self._failed_in[flip.place] < spec.forget_after
            if flip.cell in cells or recent or flip.change < -spec.largest_change:
                continue
            cells.add(flip.cell)
            best.append(flip)
            if len(best) == 4 * spec.trials:
                break
        helped = []
        for index in _mostly_first(len(best), spec.trials, random):
            flip = best[index]
            change = self._error(sample, flipped(self.plan, self._errors.kinds, flip)) - base
            if change < 0:
                helped.append(replace(flip, change=change))
            else:
                self._failed_in[flip.place] = self._step
        return sorted(helped, key=lambda flip: flip.change)

    def _change_classes(
        self,
        gradient: ReuseGradient,
        batch: SequenceBatch,
        sample: SequenceBatch,
        error: float,
        random: np.random.Generator,
    ) -> float:
        base = self._error(sample)
        helped = self._try(gradient.flips(REUSE_CLASSES), sample, base, random)
        while helped:
            plan = flipped(self.plan, self._errors.kinds, *helped)
            trial = self._error(batch, plan)
            if trial < error:
                self.plan = plan
                return trial
            helped = helped[: len(helped) // 2]
        return error

    def _measure_removals(
        self,
        gradient: ReuseGradient,
        sample: SequenceBatch,
        base: float,
        random: np.random.Generator,
    ) -> None:
        """Measure unknown removals first, then mostly the cheapest known ones again."""
        removable = np.argwhere((self.plan == Reuse.COMPUTE) & ~self._forced)
        costs = self.removal_cost[tuple(removable.T)]
        order = np.argsort(np.where(np.isnan(costs), -np.inf, costs), kind='stable')
        for index in _mostly_first(len(order), self._spec.trials, random):
            step, block = (int(value) for value in removable[order[index]])
            flip = self._removal(gradient, step, block)
            self.removal_cost[step, block] = (
                self._error(sample, flipped(self.plan, self._errors.kinds, flip)) - base
            )
            self.removal_class[step, block] = flip.reuse

    def _removal(self, gradient: ReuseGradient, step: int, block: int) -> Flip:
        """Return the flip of a computed cell to the class that seems to matter least.

        The smaller the expected change, in either direction, the more accurate the gradient is.
        """
        flips = [gradient.flip(self.plan, step, block, reuse) for reuse in REUSE_CLASSES]
        return min((f for f in flips if f is not None), key=lambda f: abs(f.change))

    def _removals(self) -> list[Flip]:
        known = (self.plan == Reuse.COMPUTE) & ~self._forced & np.isfinite(self.removal_cost)
        flips = [
            Flip(int(i), int(b), Reuse(int(self.removal_class[i, b])), self.removal_cost[i, b])
            for i, b in np.argwhere(known)
        ]
        return sorted(flips, key=lambda flip: flip.change)

    def _exchange(self, additions: Sequence[Flip], batch: SequenceBatch, error: float) -> float:
        """Exchange as many computed cells for others as help together."""
        room = self.budget.room(self.plan)
        removals = self._removals()
        while self._swap:
            added, removed = self.budget.exchange(additions, removals, self._swap, room)
            plan = flipped(self.plan, self._errors.kinds, *removed, *added)
            trial = self._error(batch, plan)
            if removed and trial < error and self.budget.affords(plan):
                self.plan = plan
                self._swap = min(2 * self._swap, self._spec.largest_swap)
                return trial
            self._swap //= 2
        self._swap = 1
        return error

    def ranking(self) -> NDArray[np.float32]:
        """Return the priority [K, N] of computing every cell, above 0 where the plan computes it.

        Computed cells are in (0, 1] by the cost of their removal. The others are in [-1, 0) by the
        order of refinement, so that other budgets give a sensible plan too.
        """
        costs = np.where(np.isnan(self.removal_cost), np.inf, self.removal_cost)
        costs[self._forced] = np.inf
        wanted = np.zeros(self.plan.shape, np.float32)
        # By steps, not by cells: a bundle's half precision could not tell so many values apart.
        steps = refinement_steps(self.plan)
        wanted[steps] = -np.arange(1, len(steps) + 1)[:, None] / max(1, len(steps))
        computed = self.plan == Reuse.COMPUTE
        wanted[computed] = _ranks(costs[computed])
        return wanted


def _ranks(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return the ranks of values, in (0, 1]."""
    ranks = np.empty(len(values), np.float32)
    ranks[np.argsort(values, kind='stable')] = np.arange(1, len(values) + 1) / max(1, len(values))
    return ranks


def _mostly_first(count: int, draws: int, random: np.random.Generator) -> list[int]:
    """Draw `draws` distinct indices below `count`, small ones more likely; return them sorted."""
    if count <= draws:
        return list(range(count))
    weights = np.exp(-np.arange(count) / draws)
    chosen = random.choice(count, draws, replace=False, p=weights / weights.sum())
    return sorted(int(index) for index in chosen)
