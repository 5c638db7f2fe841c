# SPDX-License-Identifier: Apache-2.0
"""A reuse plan compiled to a flat list of operations, in which reused blocks no longer occur.

A segment of reused blocks is one addition of a sum of stored features (`plan.segments`). Equal
segments share their sum, and the sum of a segment that opens a step is part of the step's
embedding, so that EMBED and FINISH are all that is left of a fully reused step. Sums are formed in
batches, each as early as its sources are there.

A program refers to the rows of a store of features: row i * N + b for every cell, and a last row
K * N for the constant part of the embedding, which the sums that open a step include.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

from tts_policy.policy.plan import Plan, Reuse, Segment, segments


class Op(IntEnum):
    """Operation of a program, and the meaning of its argument."""

    EMBED = 0  # begin a step: tokens = embedding of x + the sum of this number (CONSTANT: no sum)
    COMPUTE = 1  # call the block of this cell, store its residual, add it to the tokens
    ADD = 2  # add the sum of this number to the tokens
    GATHER = 3  # form the sums of the batch of this number
    FINISH = 4  # end this step: head and scheduler


CONSTANT = -1


@dataclass(frozen=True)
class Program:
    """Operations of all K steps, in order; those of step i are ops[starts[i] : starts[i + 1]].

    Sum s adds up the rows[offsets[s] : offsets[s + 1]] of the store. Batch n forms the sums
    batches[n] to batches[n + 1] - 1, so sums are formed in the order of their numbers.
    """

    ops: list[tuple[int, int]]
    starts: list[int]
    rows: NDArray[np.int64]
    offsets: NDArray[np.int64]
    batches: list[int]

    def batch_rows(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield the rows of every batch's sums, concatenated, and where each sum begins."""
        for first, last in pairwise(self.batches):
            begin, end = self.offsets[first], self.offsets[last]
            yield self.rows[begin:end], self.offsets[first:last] - begin


class _Sums:
    """The distinct sums of a plan, ordered by when the last of their sources is computed."""

    def __init__(self, plan: Plan, by_step: list[list[Segment]]) -> None:
        # A source of this tick is ready once it is computed, one of an earlier tick at once.
        computed = np.where(plan.ravel() == Reuse.COMPUTE, np.arange(plan.size), -1).tolist()
        distinct = dict.fromkeys(self._key(p) for parts in by_step for p in parts if p.sources)
        ready = {key: max(map(computed.__getitem__, key[1])) for key in distinct}
        order = sorted(ready, key=ready.__getitem__)
        self._number = {key: number for number, key in enumerate(order)}
        self.ready = [ready[key] for key in order]
        rows = [(*sources, plan.size) if opens else sources for opens, sources in order]
        self.rows = np.fromiter(chain.from_iterable(rows), np.int64)
        self.offsets = np.cumsum([0, *map(len, rows)])

    @staticmethod
    def _key(part: Segment) -> tuple[bool, tuple[int, ...]]:
        return part.blocks.start == 0, part.sources

    def number(self, part: Segment) -> int:
        return self._number[self._key(part)]


def compile_plan(plan: Plan, kinds: NDArray[np.int64]) -> Program:
    """Compile a plan [K, N] of blocks of these kinds [N].

    Raises
    ------
    PlanError
        if the plan reuses what does not exist.

    """
    by_step = segments(plan, kinds)
    sums = _Sums(plan, by_step)
    ops: list[tuple[int, int]] = []
    starts, batches = [], [0]
    for step, parts in enumerate(by_step):
        starts.append(len(ops))
        first_cell = step * plan.shape[1]
        for part in parts:
            first, cell = part.blocks.start, first_cell + part.blocks.start
            if not part.sources:
                if first == 0:
                    ops.append((Op.EMBED, CONSTANT))
                ops.extend((Op.COMPUTE, first_cell + block) for block in part.blocks)
                continue
            number = sums.number(part)
            if number >= batches[-1]:
                ops.append((Op.GATHER, len(batches) - 1))
                batches.append(bisect_left(sums.ready, cell))
            ops.append((Op.ADD if first else Op.EMBED, number))
        ops.append((Op.FINISH, step))
    starts.append(len(ops))
    return Program(ops, starts, sums.rows, sums.offsets, batches)
