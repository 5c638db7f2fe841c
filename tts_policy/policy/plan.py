# SPDX-License-Identifier: Apache-2.0
"""Reuse plans: which cells (step i, block b) are computed, and what the others reuse.

A plan is an int8 array [K, N] of `Reuse` classes. `make_plan` turns the pruner's logits and a
sparsity into a valid plan: COMPUTE for the cells with the largest margin, the best valid reuse
class for the others. `segments` says what a plan executes. `kinds` [N] numbers the kind of every
block. Validity:
- FORWARD needs a block of the same kind computed earlier in this tick,
- TIMESTEP needs this block computed at an earlier step of this tick,
- ROLLOUT needs this cell computed at an earlier tick, at most `max_rollout_age` ticks ago.
Source: arXiv 2605.13316, section 3; the knob and the validity rules are this project's.
"""

from __future__ import annotations

from enum import IntEnum
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


# Every picture of a plan is drawn in these colours, in the order of the classes: Paul Tol's
# high-contrast set on grey, which people with any colour vision tell apart, also in greyscale.
REUSE_COLOURS = ('#004488', '#BB5566', '#DDAA33', '#D3D9E1')
_REUSE_RGB = np.array([tuple(bytes.fromhex(colour[1:])) for colour in REUSE_COLOURS], np.uint8)


class PlanError(ValueError):
    """A sparsity or a plan that cannot be executed."""


def plan_rgb(plan: ArrayLike) -> NDArray[np.uint8]:
    """Colours uint8 [K, N, 3] of a plan [K, N], see REUSE_COLOURS."""
    colours: NDArray[np.uint8] = _REUSE_RGB[np.asarray(plan, np.int64)]
    return colours


def dense_plan(steps: int, blocks: int) -> Plan:
    """Plan that computes every cell."""
    return np.full((steps, blocks), Reuse.COMPUTE, np.int8)


def static_steps(steps: int, count: int) -> NDArray[np.int64]:
    """`count` steps out of `steps`: step 0 and others, quadratically denser towards the end."""
    if count >= steps:
        return np.arange(steps)
    if count == 1:
        return np.zeros(1, np.int64)
    spaced = (steps - 1) * (1 - (1 - np.linspace(0, 1, count)) ** 2)
    chosen = sorted(set(np.round(spaced).astype(int).tolist()))
    # Rounding can merge neighbours at the dense end; the latest free steps take their place.
    for step in range(steps - 1, -1, -1):
        if len(chosen) == count:
            break
        if step not in chosen:
            chosen.append(step)
    return np.array(sorted(chosen))


def static_time(steps: int) -> NDArray[np.float64]:
    """Steps [K] on a scale from 0 to 1 on which `static_steps` are evenly spaced."""
    time: NDArray[np.float64] = 1.0 - np.sqrt(1.0 - np.linspace(0.0, 1.0, steps))
    return time


def passes_plan(steps: int, blocks: int, passes: ArrayLike) -> Plan:
    """Plan that computes all blocks of some steps, in ascending order, and reuses the others.

    Steps after the first of them are TIMESTEP, steps before it ROLLOUT.
    """
    chosen = np.asarray(passes)
    plan = np.full((steps, blocks), Reuse.TIMESTEP, np.int8)
    plan[: chosen[0]] = Reuse.ROLLOUT
    plan[chosen] = Reuse.COMPUTE
    return plan


def static_plan(steps: int, blocks: int, count: int) -> Plan:
    """Baseline without learning: all blocks of `count` steps, TIMESTEP reuse at the others."""
    return passes_plan(steps, blocks, static_steps(steps, count))


def _computed_last(
    computed: NDArray[np.bool_], kinds: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cell of the same kind, and of the same block, that was computed last before every cell.

    Both are [K, N] flat indices, -1 where there is none.
    """
    cells = np.where(computed, np.arange(computed.size).reshape(computed.shape), -1)
    forward, timestep = np.full_like(cells, -1), np.full_like(cells, -1)
    np.maximum.accumulate(cells[:-1], axis=0, out=timestep[1:])
    for kind in set(kinds.tolist()):
        columns = np.flatnonzero(kinds == kind)
        of_kind = cells[:, columns].ravel()
        before = np.full_like(of_kind, -1)
        np.maximum.accumulate(of_kind[:-1], out=before[1:])
        forward[:, columns] = before.reshape(len(cells), -1)
    return forward, timestep


def computed_before(
    computed: NDArray[np.bool_], kinds: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Where FORWARD and TIMESTEP are valid, each [K, N], given the computed cells [K, N]."""
    forward, timestep = _computed_last(computed, kinds)
    return forward >= 0, timestep >= 0


def make_plan(
    logits: NDArray[np.float32],
    sparsity: float,
    rollout_valid: NDArray[np.bool_],
    force_first_step: bool,
    kinds: NDArray[np.int64],
) -> Plan:
    """Plan that reuses the `sparsity` share of the cells.

    logits: [K, N, 4]; rollout_valid: [K, N], where an earlier tick's feature may be reused.
    Cells without a valid source are computed in addition, so the realised sparsity can be lower
    than the one that was asked for. It is counted from the plan, never assumed.

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
        most = f'at most {1 - 1 / steps:.4g} with step 0 computed'
        raise PlanError(f'sparsity: expected {most}, got {sparsity}')
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

    One store indexed by cell serves as all three caches of the paper: FORWARD and TIMESTEP point
    to the cell computed last in this tick, ROLLOUT to the cell itself, which this tick does not
    write.

    Raises
    ------
    PlanError
        if FORWARD or TIMESTEP has no computed source, or a class is unknown.

    """
    # As unsigned numbers, negative classes are above the largest one.
    if plan.view(np.uint8).max() > Reuse.ROLLOUT:
        raise PlanError(f'plan: expected classes in [0, 3], got {plan.min()} to {plan.max()}')
    forward, timestep = _computed_last(plan == Reuse.COMPUTE, kinds)
    cells = np.arange(plan.size).reshape(plan.shape)
    sources = np.choose(plan, [cells, forward, timestep, cells])
    if sources.min() < 0:
        i, b = np.argwhere(sources < 0)[0]
        name = Reuse(int(plan[i, b])).name
        raise PlanError(
            f'plan: expected a computed source for {name} reuse at step {i}, block {b}, got none'
        )
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
