# SPDX-License-Identifier: Apache-2.0
"""Lessons of a pruner: consecutive ticks with exact targets, and batches of them run by a plan.

Teacher and student share the held noise, so the dense action is an exact target (the paper's code
compares with recorded actions, which were drawn with other noise).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from tts_policy.policy.plan import Plan, Reuse, resolve_sources
from tts_policy.train.tick_sequences import DenseTeacher, TickSequence


@dataclass(frozen=True)
class Lesson:
    """A sequence with its exact targets, and the features of its dense first tick.

    target: normalised dense actions [R, T, A]; first_tick: [K, N, 1, T, D]. Both depend on the
    frozen policy and the held noise alone, so they are made once.
    """

    sequence: TickSequence
    target: Tensor
    first_tick: Tensor


@torch.no_grad()
def make_lessons(teacher: DenseTeacher, sequences: Sequence[TickSequence]) -> list[Lesson]:
    """Dense targets of every sequence, with a progress bar."""
    others = not teacher.replicas.is_first
    bar = tqdm(sequences, desc='dense targets', unit='episode', mininterval=5, disable=others)
    return [
        Lesson(sequence, teacher.actions(sequence), teacher.first_tick(sequence).features)
        for sequence in bar
    ]


class LessonBatch:
    """Lessons side by side, cut to the ticks that all of them have; a process holds its share.

    count: lessons of all shares; size: of this one. An empty share holds a lesson for nothing.
    initial_noise: [B, T, A]; step_noise: [K, B, T, A], empty for a scheduler that adds none;
    observations: [R, B, To, Do]; targets: [R, B, T, A]; first_tick: [K, N, B, T, D].
    """

    def __init__(self, teacher: DenseTeacher, lessons: Sequence[Lesson]) -> None:
        self.ticks = min(len(lesson.target) for lesson in lessons)
        share = teacher.replicas.share(lessons)
        self.count, self.size = len(lessons), len(share)
        held = share or lessons[:1]
        noise = [teacher.noise(lesson.sequence.seed) for lesson in held]
        self.initial_noise = torch.cat([initial for initial, _ in noise])
        self.step_noise = torch.cat([step for _, step in noise], dim=1)
        observations = [lesson.sequence.features[: self.ticks] for lesson in held]
        self.observations = torch.stack(observations, dim=1)
        self.targets = torch.stack([lesson.target[: self.ticks] for lesson in held], dim=1)
        self.first_tick = torch.cat([lesson.first_tick for lesson in held], dim=2)

    def noise(self, step: int) -> Tensor | None:
        """Noise [B, T, A] that the scheduler adds after a step."""
        return self.step_noise[step] if len(self.step_noise) else None


PEAK_WEIGHT = 0.2


@dataclass(frozen=True)
class ActionError:
    """L1 error of chunks in normalised action units, over the part that is executed.

    Half the weight of the absolute error, and all of the error of the mean over time: the arm
    filters what changes from one set-point to the next, but not an offset of the whole chunk,
    and offsets are what a gripper misses its object by. The largest error of each joint has a
    share too: a plan may otherwise be right on average and jump at one set-point.
    """

    first: int
    execute: int

    def __call__(self, actions: Tensor, target: Tensor) -> Tensor:
        """Errors [B] of actions [B, T, A]."""
        error = (actions - target)[:, self.first : self.first + self.execute]
        size = error.abs()
        offset, peak = error.mean(dim=1).abs(), size.amax(dim=1)
        return (offset + 0.5 * size.mean(dim=1) + PEAK_WEIGHT * peak).mean(dim=-1)


class SharedPlanLoop:
    """Masked denoising of a batch of lessons that all follow one plan.

    The engine runs one episode against one cache; here B episodes share the plan, and a store of
    features [K, N, B, T, D] stands for their caches.
    """

    def __init__(self, teacher: DenseTeacher) -> None:
        self.denoiser, self.scheduler = teacher.denoiser, teacher.scheduler
        self.conditioner = teacher.conditioner
        self.kinds, self.replicas = teacher.denoiser.spec.stack.kinds, teacher.replicas

    @torch.no_grad()
    def tick(self, batch: LessonBatch, tick: int, plan: Plan, store: Tensor) -> Tensor:
        """Actions [B, T, A] of one tick; computed cells are written to the store."""
        self.conditioner.encode(batch.observations[tick])
        computed, sources = plan == Reuse.COMPUTE, resolve_sources(plan, self.kinds)
        cells = store.flatten(0, 1)
        sums: dict[bytes, Tensor] = {}
        x, x0 = batch.initial_noise, None
        for step in range(len(plan)):
            tokens, block = self.denoiser.embed(x), 0
            while block < plan.shape[1]:
                if computed[step, block]:
                    cond = self.conditioner.conditioning(step, block)
                    store[step, block] = self.denoiser.blocks[block](tokens, cond)
                    tokens = tokens + store[step, block]
                    block += 1
                    continue
                end = block + int(np.argmax(np.append(computed[step, block:], True)))
                run = sources[step, block:end]
                if run.tobytes() not in sums:
                    sums[run.tobytes()] = cells[torch.from_numpy(run)].sum(0)
                tokens, block = tokens + sums[run.tobytes()], end
            predicted = self.denoiser.predict(tokens)
            x, x0 = self.scheduler.step(step, x, predicted, batch.noise(step), x0)
        return x

    def errors(self, batch: LessonBatch, plan: Plan, measure: ActionError) -> Tensor:
        """Error of a plan in every lesson of all shares, over the ticks after the first."""
        store = batch.first_tick.clone()
        errors = [
            measure(self.tick(batch, tick, plan, store), batch.targets[tick])
            for tick in range(1, batch.ticks)
        ]
        own = torch.stack(errors).mean(dim=0)[: batch.size]
        return self.replicas.gathered(own, batch.count).cpu()

    def error(self, batch: LessonBatch, plan: Plan, measure: ActionError) -> float:
        """Mean error of a plan over lessons and ticks."""
        return float(self.errors(batch, plan, measure).mean())


def forced_cells(shape: tuple[int, ...], force_first_step: bool) -> NDArray[np.bool_]:
    """Cells [K, N] that every plan computes."""
    forced = np.zeros(shape, bool)
    forced[0] = force_first_step
    return forced
