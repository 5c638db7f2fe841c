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

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

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


def static_plan(steps: int, blocks: int, count: int) -> Plan:
    """Learning-free baseline: all blocks at `count` steps, TIMESTEP reuse at the others."""
    plan = np.full((steps, blocks), Reuse.TIMESTEP, np.int8)
    plan[static_steps(steps, count)] = Reuse.COMPUTE
    return plan


def _latest_of_kind(latest: NDArray[np.int64], kinds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Running maximum of [K, N] in order of execution, which is step-major, within each kind."""
    result = np.empty_like(latest)
    for kind in np.unique(kinds):
        of_kind = latest[:, kinds == kind]
        running = np.maximum.accumulate(of_kind.ravel())
        result[:, kinds == kind] = running.reshape(of_kind.shape)
    return result


def computed_before(
    computed: NDArray[np.bool_], kinds: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Where FORWARD and TIMESTEP are valid, each [K, N], given the computed cells [K, N]."""
    steps, blocks = computed.shape
    cells = np.arange(steps * blocks).reshape(steps, blocks)
    # A cell has an earlier one of its kind where the first computed one comes before it.
    first = np.full(blocks, steps * blocks)
    for kind in np.unique(kinds):
        of_kind = cells[computed & (kinds == kind)]
        first[kinds == kind] = of_kind[0] if of_kind.size else steps * blocks
    by_step = np.logical_or.accumulate(computed, axis=0)
    timestep = np.concatenate([np.zeros((1, blocks), bool), by_step[:-1]], axis=0)
    return cells > first, timestep


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
    steps, blocks = plan.shape
    if plan.min() < 0 or plan.max() > Reuse.ROLLOUT:
        raise PlanError(f'plan classes must be in [0, 3], got {plan.min()} to {plan.max()}')
    cells = np.arange(steps * blocks).reshape(steps, blocks)
    computed = plan == Reuse.COMPUTE
    latest = np.where(computed, cells, -1)
    timestep = np.maximum.accumulate(latest, axis=0)
    forward = _latest_of_kind(latest, kinds)
    sources = np.choose(plan, [cells, forward, timestep, cells])
    if sources.min() < 0:
        i, b = np.argwhere(sources < 0)[0]
        name = Reuse(int(plan[i, b])).name
        raise PlanError(f'{name} reuse at step {i}, block {b} has nothing computed to reuse')
    return sources


def realised_sparsity(plan: Plan) -> float:
    """Share of the cells that are reused."""
    return float((plan != Reuse.COMPUTE).mean())


def reuse_mix(plan: Plan) -> dict[str, float]:
    """Share of every class, by name in lower case."""
    return {kind.name.lower(): float((plan == kind).mean()) for kind in Reuse}
