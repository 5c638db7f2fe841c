# SPDX-License-Identifier: Apache-2.0
"""Training of the pruner of one sampler: a searched plan per sparsity, and what survives a stop.

A search starts from placed passes, from the next sparser plan made denser, or from the plan of
another bundle (see `plan_starts`), whichever is best within the budget of cells and their cost
(see `plan_budget`). It takes a number of steps (see `plan_search`). The plan that did best on
validation sequences, which come from other episodes, becomes the table of its sparsity. The
sequences of a step are drawn with a preference for those with large errors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tts_policy.policy.plan import Plan, Reuse, passes_plan, static_plan
from tts_policy.policy.pruner import Pruner, PrunerSpec
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.train.plan_budget import PlanBudget
from tts_policy.train.plan_search import PlanSearch, SearchSpec
from tts_policy.train.plan_starts import PriorPlans, placed_passes, refined
from tts_policy.train.sequences import (
    ActionError,
    DenseTeacher,
    PlanErrors,
    SequenceBatch,
    SequenceChoice,
    TrainingSequence,
)

VALIDATE_EVERY = 4


@dataclass(frozen=True)
class PrunerTrainingSpec:
    """Settings of a training.

    steps: search steps per sparsity; batch: sequences of a step; sample: of them, those that the
    gradient uses; preference: share of the draws that follows the error of a sequence, the others
    are uniform.
    """

    steps: int
    batch: int
    sample: int
    seed: int
    preference: float = 0.5
    search: SearchSpec = field(default_factory=SearchSpec)


class PrunerTrainer:
    """Searches one plan per sparsity, the sparsest first, and owns all state of the search."""

    def __init__(
        self,
        teacher: DenseTeacher,
        sampler: SamplerSpec,
        sparsities: list[float],
        sequences: list[TrainingSequence],
        validation: list[TrainingSequence],
        measure: ActionError,
        spec: PrunerTrainingSpec,
        prior: PriorPlans | None = None,
    ) -> None:
        self._errors, self.spec = PlanErrors(teacher, measure), spec
        self.sampler, self.sparsities = sampler, sorted(sparsities)
        self._validation = [
            SequenceBatch(teacher, validation[first : first + spec.batch])
            for first in range(0, len(validation), spec.batch)
        ]
        self._teacher = teacher
        self.choice = SequenceChoice(teacher, sequences, spec.preference)
        shape = (sampler.scheduler.steps, teacher.denoiser.spec.blocks)
        self._forced = np.zeros(shape, bool)
        self._forced[0] = sampler.force_first_step
        self.tables: dict[float, Tensor] = {}
        self.best_error = float('inf')
        self.step = 0
        self._prior = prior
        self._begin(static_plan(*shape, self._whole_passes()[0]))

    @property
    def sparsity(self) -> float:
        """The sparsity that is being searched."""
        return self.sparsities[-1 - len(self.tables)]

    @property
    def total_steps(self) -> int:
        """Number of search steps for all sparsities."""
        return self.spec.steps * len(self.sparsities)

    def _budget(self) -> PlanBudget:
        """Return the budget of the present sparsity, less the cost of the pruner."""
        cells = round((1 - self.sparsity) * self._forced.size)
        cost = self._teacher.denoiser.spec.stack.flops
        return PlanBudget(cells, cost, self._pruner_spec().flops)

    def _whole_passes(self) -> list[int]:
        """Return the numbers of whole passes just below and just above the budget, at least one.

        It is a single number if the cells make whole passes.
        """
        passes = self._budget().cells / self._forced.shape[1]
        return sorted({max(1, int(passes)), max(1, ceil(passes))})

    def _begin(self, start: Plan) -> None:
        """Begin with the next sparsity; the search may start from a plan."""
        self._search: PlanSearch | None = None
        self.best, self.best_error = start, float('inf')

    def _placed_passes(self, batch: SequenceBatch) -> list[Plan]:
        """Return plans of whole passes near the budget, placed where their error is least."""
        steps, blocks = self._forced.shape

        def error(passes: list[int]) -> float:
            return self._errors.mean(batch, passes_plan(steps, blocks, passes))

        found = [
            placed_passes(error, steps, count, self.sampler.force_first_step)
            for count in self._whole_passes()
        ]
        return [passes_plan(steps, blocks, passes) for passes, _ in found]

    def _prior_plans(self) -> list[Plan]:
        """Return the plans of the prior for the present sparsity, if there is a prior."""
        if self._prior is None:
            return []
        return self._prior.plans(self._budget().cells, self.sampler, self._teacher.kinds)

    def _new_search(self, plan: Plan) -> PlanSearch:
        budget = self._budget()
        return PlanSearch(self._errors, plan, budget, self._forced, self.spec.search)

    def _start(self, random: np.random.Generator) -> PlanSearch:
        """Return a search from the start that is best once it has shrunk or grown to the budget.

        This start is the best plan so far: a step may help its batch but not in validation.
        """
        placed = self._placed_passes(self._batch(random, self.spec.batch)[0])
        grown = refined(self.best, self._budget().cells)
        searches = [self._new_search(plan) for plan in (grown, *placed, *self._prior_plans())]
        for search in searches:
            shrinking = True
            while shrinking and not search.affordable:
                shrinking = search.shrink(self._batch(random, self.spec.sample)[1])
            while search.computed < search.budget.cells:
                search.grow(self._batch(random, self.spec.sample)[1])
        merits = [(not s.affordable, self._validation_error(s.plan)) for s in searches]
        (_, self.best_error), search = min(
            zip(merits, searches, strict=True), key=lambda pair: pair[0]
        )
        self.best = search.plan
        return search

    def _random(self) -> np.random.Generator:
        """Return the random numbers of this step; they depend only on seed and step."""
        return np.random.default_rng([self.spec.seed, self.step])

    def _batch(
        self, random: np.random.Generator, size: int
    ) -> tuple[SequenceBatch, SequenceBatch]:
        drawn = self.choice.draw(random, size)
        part = drawn[: self.spec.sample]
        return SequenceBatch(self._teacher, drawn), SequenceBatch(self._teacher, part)

    def train_step(self) -> tuple[float, float, float]:
        """Take a search step; return error before and after, and the best validation error."""
        random = self._random()
        if self._search is None:
            self._search = self._start(random)
            self.choice.measure(self._errors, self.best, self.spec.batch)
        before, after = self._search.step(*self._batch(random, self.spec.batch), random)
        self.step += 1
        done = self.step % self.spec.steps == 0
        if done or self.step % VALIDATE_EVERY == 0:
            self._validate(self._search.plan)
            self.choice.measure(self._errors, self._search.plan, self.spec.batch)
        best = self.best_error
        if done:
            self._finish(self._search)
        return before, after, best

    def _validation_error(self, plan: Plan) -> float:
        return float(np.mean([self._errors.mean(batch, plan) for batch in self._validation]))

    def _validate(self, plan: Plan) -> None:
        """Remember the plan if it is the best so far."""
        error = self._validation_error(plan)
        if error < self.best_error:
            self.best, self.best_error = plan, error

    def _finish(self, search: PlanSearch) -> None:
        """Turn the best plan into the table of its sparsity and begin the next one."""
        search.plan = self.best
        self.tables[self.sparsity] = plan_table(self.best, search.ranking())
        if len(self.tables) < len(self.sparsities):
            self._begin(self.best)

    def pruner(self) -> Pruner:
        """Return the trained pruner; weights that no search sets are drawn from the run's seed."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.spec.seed)
            pruner = Pruner(self._pruner_spec())
            pruner.tables.copy_(torch.stack([self.tables[s] for s in self.sparsities]))
        return pruner

    def _pruner_spec(self) -> PrunerSpec:
        steps, sparsities = self.sampler.scheduler.steps, tuple(self.sparsities)
        return PrunerSpec.of(self._teacher.denoiser.spec, steps, sparsities)

    def state(self) -> dict[str, Any]:
        """Return everything that `restore` needs to continue."""
        return {
            'step': self.step,
            'tables': self.tables,
            'best': torch.from_numpy(self.best),
            'best_error': self.best_error,
            'search': None if self._search is None else self._search.state(),
            'sequence_errors': self.choice.errors,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state`."""
        self.step, self.tables = state['step'], state['tables']
        self.choice.errors = state['sequence_errors']
        if len(self.tables) < len(self.sparsities):
            self._begin(state['best'].numpy())
            self.best_error = state['best_error']
            if state['search'] is not None:
                self._search = self._new_search(self.best)
                self._search.restore(state['search'])


def plan_table(plan: Plan, ranking: NDArray[np.float32]) -> Tensor:
    """Return logits [K, N, 4] that give `plan` at its own sparsity.

    ranking [K, N]: above 0 where the plan computes; it orders the cells for other sparsities.
    Where the class of the plan has no source, the order is TIMESTEP, ROLLOUT, FORWARD.
    """
    table = np.zeros((*plan.shape, len(Reuse)), np.float32)
    table[..., Reuse.FORWARD], table[..., Reuse.ROLLOUT], table[..., Reuse.TIMESTEP] = (
        0.1,
        0.2,
        0.3,
    )
    reused = plan != Reuse.COMPUTE
    step, block = np.nonzero(reused)
    table[step, block, plan[reused]] = 1.0
    table[..., Reuse.COMPUTE] = table[..., Reuse.FORWARD :].max(axis=-1) + ranking
    return torch.from_numpy(table)
