# SPDX-License-Identifier: Apache-2.0
"""A reuse plan compiled to a flat list of operations, in which reused blocks no longer occur.

A run of consecutive reused blocks is one addition of a sum of stored features; equal runs share
their sum, over steps as well, and a run that opens a step is part of the step's embedding. What a
fully reused step leaves behind is EMBED and FINISH. Sums are formed in batches, each as early as
its sources are there.

The store of features that a program refers to has one row per cell, i * N + b, and a last row
[K * N] for the constant part of the embedding, which the sums that open a step include.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tts_policy.policy.plan import Plan, Reuse, resolve_sources


class Op(IntEnum):
    """Operation of a program; the argument's meaning is given with each."""

    EMBED = 0  # begin a step: tokens = embedding of x + sum of this number (CONSTANT: no sum)
    COMPUTE = 1  # run the block of this cell, store its residual there, add it to the tokens
    ADD = 2  # add the sum of this number to the tokens
    GATHER = 3  # form the sums of the batch of this number
    FINISH = 4  # end this step: head and scheduler


CONSTANT = -1


@dataclass(frozen=True)
class Program:
    """Operations of all K steps, in order; those of step i are ops[starts[i] : starts[i + 1]].

    Sum s adds up the rows[offsets[s] : offsets[s + 1]] of the store; batch n forms the sums
    batches[n] : batches[n + 1], so sums are formed in the order of their numbers.
    """

    ops: list[tuple[int, int]]
    starts: list[int]
    rows: NDArray[np.int64]
    offsets: NDArray[np.int64]
    batches: list[int]

    def batch_rows(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield every batch as the rows of its sums, concatenated, and where each sum begins."""
        for first, last in pairwise(self.batches):
            begin, end = self.offsets[first], self.offsets[last]
            yield self.rows[begin:end], self.offsets[first:last] - begin


class _Sums:
    """The distinct sums of a plan, ordered by when the last of their sources is there."""

    def __init__(self, sources: NDArray[np.int64], computed: NDArray[np.bool_]) -> None:
        steps, blocks = computed.shape
        # A run begins and ends within a step: computed cells stand around every one.
        framed = np.ones((steps, blocks + 2), bool)
        framed[:, 1:-1] = computed
        flat = sources.ravel()
        firsts = np.flatnonzero(framed[:, :-2] & ~computed)
        ends = np.flatnonzero(framed[:, 2:] & ~computed) + 1
        # A source of this tick is ready once it is computed, one of an earlier tick always.
        ready = np.append(np.where(computed.ravel()[flat], flat, -1), -1)
        bounds = np.stack([firsts, ends], axis=1).ravel()
        last_ready = np.maximum.reduceat(ready, bounds)[::2].tolist() if len(firsts) else []
        distinct: dict[tuple[bool, bytes], int] = {}
        keys = []
        for first, end, at in zip(firsts.tolist(), ends.tolist(), last_ready, strict=True):
            key = (first % blocks == 0, flat[first:end].tobytes())
            distinct[key] = at
            keys.append(key)
        order = sorted(distinct, key=distinct.__getitem__)
        number = {key: n for n, key in enumerate(order)}
        self.ready = [distinct[key] for key in order]
        # First cell of a run -> number of its sum.
        self.at = dict(zip(firsts.tolist(), map(number.__getitem__, keys), strict=True))
        constant = np.array([flat.size]).tobytes()
        rows = [key + constant if opens else key for opens, key in order]
        self.rows = np.frombuffer(bytearray().join(rows), np.int64)
        self.offsets = np.cumsum([0, *(len(row) // flat.itemsize for row in rows)])


def compile_plan(plan: Plan, kinds: NDArray[np.int64]) -> Program:
    """Compile a plan [K, N] of blocks of these kinds [N].

    Raises
    ------
    PlanError
        if the plan reuses what does not exist.

    """
    steps, blocks = plan.shape
    computed = plan == Reuse.COMPUTE
    sums = _Sums(resolve_sources(plan, kinds), computed)
    ops: list[tuple[int, int]] = []
    starts: list[int] = []
    batches = [0]
    for cell in sorted([*np.flatnonzero(computed).tolist(), *sums.at]):
        step, block = divmod(cell, blocks)
        if block == 0:
            if step:
                ops.append((Op.FINISH, step - 1))
            starts.append(len(ops))
        number = sums.at.get(cell)
        if number is None:
            if block == 0:
                ops.append((Op.EMBED, CONSTANT))
            ops.append((Op.COMPUTE, cell))
            continue
        if number >= batches[-1]:
            ops.append((Op.GATHER, len(batches) - 1))
            batches.append(bisect_left(sums.ready, cell))
        ops.append((Op.ADD if block else Op.EMBED, number))
    ops.append((Op.FINISH, steps - 1))
    starts.append(len(ops))
    return Program(ops, starts, sums.rows, sums.offsets, batches)
