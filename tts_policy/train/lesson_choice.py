# SPDX-License-Identifier: Apache-2.0
"""Which lessons a step of the search looks at: those in which reuse errs most come more often.

Most ticks of a recording are easy, the arm only goes on, and any plan is right there. What a plan
must get right are the ticks at which the action depends on details, and these show by their error.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tts_policy.policy.plan import Plan
from tts_policy.train.lessons import ActionError, Lesson, LessonBatch, SharedPlanLoop
from tts_policy.train.tick_sequences import DenseTeacher


class LessonChoice:
    """Draws lessons; `preference` is the share of the draws that go by error.

    errors: [M] of every lesson, None before the first `judge`, when all are alike.
    """

    def __init__(
        self, teacher: DenseTeacher, lessons: Sequence[Lesson], preference: float
    ) -> None:
        if not 0.0 <= preference <= 1.0:
            raise ValueError(f'preference must be in [0, 1], got {preference}')
        self.lessons, self._teacher, self._preference = lessons, teacher, preference
        self.errors: Tensor | None = None

    def judge(self, loop: SharedPlanLoop, plan: Plan, measure: ActionError, size: int) -> None:
        """Measure what every lesson errs by with a plan, `size` of them at a time."""
        if self._preference:
            parts = [self.lessons[i : i + size] for i in range(0, len(self.lessons), size)]
            batches = (LessonBatch(self._teacher, part) for part in parts)
            self.errors = torch.cat([loop.errors(batch, plan, measure) for batch in batches])

    def draw(self, random: np.random.Generator, count: int) -> list[Lesson]:
        """`count` different lessons, all of them if there are fewer."""
        count = min(count, len(self.lessons))
        chances = np.full(len(self.lessons), 1 / len(self.lessons))
        if self.errors is not None and self.errors.any():
            # A lesson without an error comes last, but it comes where there are too few others.
            errors = self.errors.double().numpy().clip(1e-9 * float(self.errors.max()))
            chances += self._preference * (errors / errors.sum() - chances)
        chosen = random.choice(len(self.lessons), count, replace=False, p=chances)
        return [self.lessons[index] for index in chosen]
