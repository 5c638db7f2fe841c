# SPDX-License-Identifier: Apache-2.0
"""Training of the pruner of one sampler: a searched plan per sparsity, and what survives a stop.

Every plan starts from whole passes, placed where they help most (see `pass_search`), grows from
the next sparser one's, or is another bundle's, whichever is best within the budget of cells and
their cost (see `plan_budget`). Each is searched for a number of steps (see `plan_search`); the one
that did best on lessons kept back, which are of other episodes, becomes the table of its sparsity.
The lessons of a step are drawn with a preference for those in which reuse errs most.
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
from tts_policy.train.lesson_choice import LessonChoice
from tts_policy.train.lessons import (
    ActionError,
    Lesson,
    LessonBatch,
    SharedPlanLoop,
    forced_cells,
)
from tts_policy.train.pass_search import placed_passes
from tts_policy.train.plan_budget import PlanBudget
from tts_policy.train.plan_search import PlanSearch, SearchSpec
from tts_policy.train.prior_plans import PriorPlans
from tts_policy.train.refinement import refined
from tts_policy.train.tick_sequences import DenseTeacher

VALIDATE_EVERY = 4


@dataclass(frozen=True)
class PrunerTrainingSpec:
    """Settings: search steps per sparsity, lessons a step and of them in a gradient, seed.

    preference: share of the draws that go by the error of a lesson, the others are uniform.
    """

    steps: int
    batch: int
    sample: int
    seed: int
    preference: float = 0.5
    search: SearchSpec = field(default_factory=SearchSpec)


class PrunerTrainer:
    """Searches one plan per sparsity, the sparsest first, and owns all state of that."""

    def __init__(
        self,
        teacher: DenseTeacher,
        sampler: SamplerSpec,
        sparsities: list[float],
        lessons: list[Lesson],
        kept_back: list[Lesson],
        measure: ActionError,
        spec: PrunerTrainingSpec,
        prior: PriorPlans | None = None,
    ) -> None:
        self._loop, self._measure, self.spec = SharedPlanLoop(teacher), measure, spec
        self.sampler, self.sparsities = sampler, sorted(sparsities)
        self._kept = [
            LessonBatch(teacher, kept_back[first : first + spec.batch])
            for first in range(0, len(kept_back), spec.batch)
        ]
        self._teacher = teacher
        self.choice = LessonChoice(teacher, lessons, spec.preference)
        shape = (sampler.scheduler.steps, teacher.denoiser.spec.blocks)
        self._forced = forced_cells(shape, sampler.force_first_step)
        self.tables: dict[float, Tensor] = {}
        self.best_error = float('inf')
        self.step = 0
        self._prior = prior
        self._begin(static_plan(*shape, self._whole_passes()[0]))

    @property
    def sparsity(self) -> float:
        """The sparsity in work."""
        return self.sparsities[-1 - len(self.tables)]

    @property
    def total_steps(self) -> int:
        """Search steps for all sparsities."""
        return self.spec.steps * len(self.sparsities)

    def _budget(self) -> PlanBudget:
        """Cells of the sparsity in work, at the cost of whole passes with the pruner's in it."""
        cells = round((1 - self.sparsity) * self._forced.size)
        cost = self._teacher.denoiser.spec.stack.flops
        return PlanBudget(cells, cost, self._pruner_spec().flops)

    def _whole_passes(self) -> list[int]:
        """Whole passes that the cells of the sparsity in work suffice for, and are short of.

        At least one pass; a single number if the cells are those of whole passes.
        """
        passes = self._budget().cells / self._forced.shape[1]
        return sorted({max(1, int(passes)), max(1, ceil(passes))})

    def _begin(self, start: Plan) -> None:
        """Begin with the sparsity in work; a plan that the search may start from."""
        self._search: PlanSearch | None = None
        self.best, self.best_error = start, float('inf')

    def _placed_passes(self, batch: LessonBatch) -> list[Plan]:
        """Plans of whole passes near the budget, each placed where its error is least."""
        steps, blocks = self._forced.shape

        def error(passes: list[int]) -> float:
            plan = passes_plan(steps, blocks, passes)
            return self._loop.error(batch, plan, self._measure)

        found = [
            placed_passes(error, steps, count, self.sampler.force_first_step)
            for count in self._whole_passes()
        ]
        return [passes_plan(steps, blocks, passes) for passes, _ in found]

    def _prior_plans(self) -> list[Plan]:
        """The prior's plans for the sparsity in work, if there is one."""
        if self._prior is None:
            return []
        kinds = self._teacher.denoiser.spec.stack.kinds
        return self._prior.plans(self._budget().cells, self.sampler, kinds)

    def _new_search(self, plan: Plan) -> PlanSearch:
        budget = self._budget()
        return PlanSearch(self._loop, self._measure, plan, budget, self._forced, self.spec.search)

    def _start(self, random: np.random.Generator) -> PlanSearch:
        """Search from the start that is best once it has shrunk or grown to the budget.

        It counts as the best plan: a step may help its batch and not the lessons kept back.
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
        merits = [(not s.affordable, self._kept_error(s.plan)) for s in searches]
        (_, self.best_error), search = min(
            zip(merits, searches, strict=True), key=lambda pair: pair[0]
        )
        self.best = search.plan
        return search

    def _random(self) -> np.random.Generator:
        """Random numbers of the step in work; they depend on seed and step alone."""
        return np.random.default_rng([self.spec.seed, self.step])

    def _judge_lessons(self, plan: Plan) -> None:
        self.choice.judge(self._loop, plan, self._measure, self.spec.batch)

    def _batch(self, random: np.random.Generator, size: int) -> tuple[LessonBatch, LessonBatch]:
        lessons = self.choice.draw(random, size)
        part = lessons[: self.spec.sample]
        return LessonBatch(self._teacher, lessons), LessonBatch(self._teacher, part)

    def train_step(self) -> tuple[float, float, float]:
        """One step of the search in work.

        Returns the error on the batch before and after, and the best on the lessons kept back.
        """
        random = self._random()
        if self._search is None:
            self._search = self._start(random)
            self._judge_lessons(self.best)
        before, after = self._search.step(*self._batch(random, self.spec.batch), random)
        self.step += 1
        done = self.step % self.spec.steps == 0
        if done or self.step % VALIDATE_EVERY == 0:
            self._validate(self._search.plan)
            self._judge_lessons(self._search.plan)
        best = self.best_error
        if done:
            self._finish(self._search)
        return before, after, best

    def _kept_error(self, plan: Plan) -> float:
        """Error of a plan on the lessons kept back."""
        return float(np.mean([self._loop.error(b, plan, self._measure) for b in self._kept]))

    def _validate(self, plan: Plan) -> None:
        """Remember the plan if it is the best so far."""
        error = self._kept_error(plan)
        if error < self.best_error:
            self.best, self.best_error = plan, error

    def _finish(self, search: PlanSearch) -> None:
        """Turn the best plan into the table of its sparsity and go on to the next."""
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
        """Everything that `restore` continues from."""
        return {
            'step': self.step,
            'tables': self.tables,
            'best': torch.from_numpy(self.best),
            'best_error': self.best_error,
            'search': None if self._search is None else self._search.state(),
            'lesson_errors': self.choice.errors,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state`."""
        self.step, self.tables = state['step'], state['tables']
        self.choice.errors = state['lesson_errors']
        if len(self.tables) < len(self.sparsities):
            self._begin(state['best'].numpy())
            self.best_error = state['best_error']
            if state['search'] is not None:
                self._search = self._new_search(self.best)
                self._search.restore(state['search'])


def plan_table(plan: Plan, ranking: NDArray[np.float32]) -> Tensor:
    """Logits [K, N, 4] whose plan at the sparsity of `plan` is that plan.

    ranking [K, N]: above 0 where the plan computes; orders cells for other sparsities. Where the
    class of the plan has no source, TIMESTEP is preferred to ROLLOUT and that to FORWARD.
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
