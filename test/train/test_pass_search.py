# SPDX-License-Identifier: Apache-2.0
"""Placement of whole passes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tts_policy.policy.plan import Reuse, passes_plan, resolve_sources, static_steps
from tts_policy.train.pass_search import placed_passes

KINDS = np.arange(6) % 3


@st.composite
def wanted_steps(draw: st.DrawFn) -> tuple[int, list[int]]:
    """Number of steps, and where in them passes should be."""
    steps = draw(st.integers(2, 100))
    wanted = draw(st.sets(st.integers(0, steps - 1), min_size=1, max_size=min(8, steps)))
    return steps, sorted(wanted)


@given(wanted_steps())
def test_passes_go_where_they_are_wanted(case: tuple[int, list[int]]) -> None:
    steps, wanted = case

    def error(passes: list[int]) -> float:
        return float(np.abs(np.subtract(passes, wanted)).sum())

    assert placed_passes(error, steps, len(wanted), False) == (wanted, 0.0)


@given(wanted_steps(), st.booleans(), st.integers(0, 999))
def test_no_neighbouring_placement_is_better_whatever_the_error(
    case: tuple[int, list[int]], forced: bool, seed: int
) -> None:
    steps, count = case[0], len(case[1])

    def error(passes: list[int]) -> float:
        return float(hash((seed, *passes)) % 997)

    passes, best = placed_passes(error, steps, count, forced)
    assert best == error(passes) <= error(static_steps(steps, count).tolist())
    assert passes == sorted(set(passes)) and len(passes) == count
    assert passes[0] >= 0 and passes[-1] < steps
    if forced:
        assert passes[0] == 0
    for index in range(int(forced), count):
        for change in (-1, 1):
            moved = [*passes[:index], passes[index] + change, *passes[index + 1 :]]
            if moved == sorted(set(moved)) and moved[0] >= 0 and moved[-1] < steps:
                assert error(moved) >= best


@given(wanted_steps())
def test_whole_passes_can_be_executed_and_cost_what_they_are(case: tuple[int, list[int]]) -> None:
    steps, passes = case
    plan = passes_plan(steps, len(KINDS), passes)
    resolve_sources(plan, KINDS)
    assert np.flatnonzero((plan == Reuse.COMPUTE).all(1)).tolist() == passes
    assert (plan == Reuse.COMPUTE).sum() == len(passes) * len(KINDS)
    assert (plan[: passes[0]] == Reuse.ROLLOUT).all()
    assert set(np.unique(plan[passes[0] :])) <= {Reuse.COMPUTE, Reuse.TIMESTEP}
