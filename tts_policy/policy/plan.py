# SPDX-License-Identifier: Apache-2.0
"""Reuse plans: which cells (step i, block b) are computed and where the others take their feature.

A plan is an int8 array [K, N] of `Reuse` classes. `make_plan` turns the pruner's logits and a
sparsity into a valid plan: COMPUTE for the cells with the largest margin, the best valid reuse
class for the others. `kinds` [N] numbers the kind of every block. Validity:
- FORWARD needs a block of the same kind computed earlier in this tick,
- TIMESTEP needs this block computed at an earlier step of this tick,
- ROLLOUT needs this cell computed at an earlier tick, at most `max_rollout_age` ticks ago.
Source: arXiv 2605.13316, section 3; the knob and the validity rules are this project's.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Plan = NDArray[np.int8]


class Reuse(IntEnum):
    """Where the feature of a cell comes from; the order is that of the pruner's logits."""

    COMPUTE = 0
    FORWARD = 1
    TIMESTEP = 2
    ROLLOUT = 3


class PlanError(ValueError):
    """A sparsity or a plan that cannot be executed."""


def dense_plan(steps: int, blocks: int) -> Plan:
    """Plan that computes every cell."""
    return np.full((steps, blocks), Reuse.COMPUTE, np.int8)


def static_steps(steps: int, count: int) -> NDArray[np.int64]:
    """`count` steps out of `steps`, step 0 first, quadratically denser toward the end."""
    if count >= steps:
        return np.arange(steps)
    if count == 1:
        return np.zeros(1, np.int64)
    spaced = (steps - 1) * (1 - (1 - np.linspace(0, 1, count)) ** 2)
    chosen = sorted(set(np.round(spaced).astype(int).tolist()))
    # Rounding can merge neighbours at the dense end: take the latest steps still free.
    for step in range(steps - 1, -1, -1):
        if len(chosen) == count:
            break
        if step not in chosen:
            chosen.append(step)
    return np.array(sorted(chosen))


def static_time(steps: int) -> NDArray[np.float64]:
    """Steps [K] on the scale from 0 to 1 on which those of a static schedule are evenly spaced."""
    time: NDArray[np.float64] = 1.0 - np.sqrt(1.0 - np.linspace(0.0, 1.0, steps))
    return time


def passes_plan(steps: int, blocks: int, passes: ArrayLike) -> Plan:
    """All blocks at some steps, in ascending order; TIMESTEP after the first, ROLLOUT before."""
    chosen = np.asarray(passes)
    plan = np.full((steps, blocks), Reuse.TIMESTEP, np.int8)
    plan[: chosen[0]] = Reuse.ROLLOUT
    plan[chosen] = Reuse.COMPUTE
    return plan


def static_plan(steps: int, blocks: int, count: int) -> Plan:
    """Learning-free baseline: all blocks at `count` steps, TIMESTEP reuse at the others."""
    return passes_plan(steps, blocks, static_steps(steps, count))


@dataclass(frozen=True)
class _ByKind:
    """Order in which the cells of each kind follow one another, in order of execution.

    cells: [K, N], numbered as they are executed; order: all cells, those of a kind together;
    begins: where each kind begins in it; of_block: number of the kind of every block [N]; base:
    what keeps a running maximum in this order from one kind to the next.
    """

    cells: NDArray[np.int64]
    order: NDArray[np.int64]
    begins: NDArray[np.int64]
    of_block: NDArray[np.int64]
    base: NDArray[np.int64]

    def latest(self, latest: NDArray[np.int64]) -> NDArray[np.int64]:
        """Running maximum of [K, N] cell numbers, -1 for none, within each kind."""
        running = latest.ravel()[self.order]
        running += self.base
        np.maximum.accumulate(running, out=running)
        running -= self.base
        result = np.empty_like(latest)
        result.ravel()[self.order] = running
        return result

    def first(self, computed: NDArray[np.bool_]) -> NDArray[np.int64]:
        """First computed cell of the kind of every block [N]; behind the last cell if none."""
        cells = np.where(computed, self.cells, self.cells.size).ravel()[self.order]
        first: NDArray[np.int64] = np.minimum.reduceat(cells, self.begins)[self.of_block]
        return first


@lru_cache(maxsize=32)
def _order_by_kind(steps: int, kinds: bytes) -> _ByKind:
    """Order of K steps of blocks of these kinds, int64 [N]: it is the same at every tick."""
    _, of_block = np.unique(np.frombuffer(kinds, np.int64), return_inverse=True)
    cells = np.arange(steps * len(of_block)).reshape(steps, -1)
    of_cell = np.tile(of_block, steps)
    order = np.argsort(of_cell, kind='stable')
    begins = np.searchsorted(of_cell[order], np.arange(of_block.max() + 1))
    return _ByKind(cells, order, begins, of_block, of_cell[order] * (cells.size + 1))


def _by_kind(steps: int, kinds: NDArray[np.int64]) -> _ByKind:
    return _order_by_kind(steps, kinds.astype(np.int64, copy=False).tobytes())


def computed_before(
    computed: NDArray[np.bool_], kinds: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Where FORWARD and TIMESTEP are valid, each [K, N], given the computed cells [K, N]."""
    by_kind = _by_kind(len(computed), kinds)
    timestep = np.zeros_like(computed)
    np.logical_or.accumulate(computed[:-1], axis=0, out=timestep[1:])
    return by_kind.cells > by_kind.first(computed), timestep


def make_plan(
    logits: NDArray[np.float32],
    sparsity: float,
    rollout_valid: NDArray[np.bool_],
    force_first_step: bool,
    kinds: NDArray[np.int64],
) -> Plan:
    """Plan that reuses the `sparsity` share of the cells.

    logits: [K, N, 4]; rollout_valid: [K, N], where an earlier tick's feature may be reused.
    Cells that have no valid source are computed on top, so the realised sparsity can be lower
    than the one asked for; it is counted from the plan, never assumed.

    Raises
    ------
    PlanError
        if the budget is smaller than the forced cells.

    """
    steps, blocks = rollout_valid.shape
    budget = round((1.0 - sparsity) * steps * blocks)
    forced = np.zeros((steps, blocks), bool)
    forced[0] = force_first_step
    if budget < forced.sum():
        raise PlanError(
            f'sparsity must be at most {1 - 1 / steps:.4g} with step 0 computed, got {sparsity}'
        )
    margin = logits[..., Reuse.COMPUTE] - logits[..., Reuse.FORWARD :].max(axis=-1)
    margin = np.where(forced, np.inf, margin).ravel()
    computed = np.zeros(steps * blocks, bool)
    computed[np.argsort(-margin, kind='stable')[:budget]] = True
    computed = computed.reshape(steps, blocks)
    while True:
        forward, timestep = computed_before(computed, kinds)
        stranded = ~(computed | forward | timestep | rollout_valid)
        if not stranded.any():
            break
        # Computing the first stranded cell of each kind may give the later ones a source.
        computed.ravel()[np.flatnonzero(stranded)[0]] = True
    valid = np.stack([forward, timestep, rollout_valid], axis=-1)
    reuse = np.where(valid, logits[..., Reuse.FORWARD :], -np.inf).argmax(axis=-1) + 1
    return np.where(computed, Reuse.COMPUTE, reuse).astype(np.int8)


def resolve_sources(plan: Plan, kinds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Cell whose stored feature every cell of a plan uses: flat indices i * N + b, [K, N].

    A feature store indexed by cell serves all three caches: FORWARD and TIMESTEP point to the
    cell computed last in this tick, ROLLOUT to the cell itself, which this tick leaves alone.

    Raises
    ------
    PlanError
        if FORWARD or TIMESTEP has no computed source, or a class is unknown.

    """
    # Below zero is above the largest as an unsigned number.
    if plan.view(np.uint8).max() > Reuse.ROLLOUT:
        raise PlanError(f'plan classes must be in [0, 3], got {plan.min()} to {plan.max()}')
    by_kind = _by_kind(len(plan), kinds)
    cells = by_kind.cells
    latest = np.where(plan == Reuse.COMPUTE, cells, -1)
    timestep = np.maximum.accumulate(latest, axis=0)
    forward = by_kind.latest(latest)
    sources = np.choose(plan, [cells, forward, timestep, cells])
    if sources.min() < 0:
        i, b = np.argwhere(sources < 0)[0]
        name = Reuse(int(plan[i, b])).name
        raise PlanError(f'{name} reuse at step {i}, block {b} has nothing computed to reuse')
    return sources


class Segment(NamedTuple):
    """Consecutive residual blocks of one step that are all computed, or all reused.

    Residuals add up, so a segment of reused blocks is one addition: of the sum of the features of
    `sources`, the flat cell indices that `resolve_sources` gives; empty for computed blocks.
    Within a tick a cell is written at most once, before anything in the tick reads it. Segments
    with equal sources therefore have the same sum, whichever step they belong to.
    """

    blocks: range
    sources: tuple[int, ...]


def segments(plan: Plan, kinds: NDArray[np.int64]) -> list[list[Segment]]:
    """Segments of every step of a plan [K, N], in the order of execution.

    Raises
    ------
    PlanError
        if the plan reuses what does not exist.

    """
    sources, computed = resolve_sources(plan, kinds).ravel().tolist(), plan == Reuse.COMPUTE
    begins = np.ones_like(computed)
    begins[:, 1:] = computed[:, 1:] != computed[:, :-1]
    firsts = np.flatnonzero(begins)
    is_computed = computed.ravel()[firsts].tolist()
    by_step: list[list[Segment]] = [[] for _ in plan]
    for (first, end), called in zip(
        pairwise([*firsts.tolist(), plan.size]), is_computed, strict=True
    ):
        step, block = divmod(first, plan.shape[1])
        blocks = range(block, block + end - first)
        by_step[step].append(Segment(blocks, () if called else tuple(sources[first:end])))
    return by_step


def realised_sparsity(plan: Plan) -> float:
    """Share of the cells that are reused."""
    return float((plan != Reuse.COMPUTE).mean())


def reuse_mix(plan: Plan) -> dict[str, float]:
    """Share of every class, by name in lower case."""
    return {kind.name.lower(): float((plan == kind).mean()) for kind in Reuse}
