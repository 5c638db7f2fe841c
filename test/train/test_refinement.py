# SPDX-License-Identifier: Apache-2.0
"""Denser plans: whole passes between those that there are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_policy.policy.plan import Plan, Reuse, passes_plan, static_plan
from tts_policy.train.refinement import refined, refinement_steps


def _random_plan(seed: int, steps: int, blocks: int, share: float) -> Plan:
    random = np.random.default_rng(seed)
    reused = random.integers(Reuse.FORWARD, Reuse.ROLLOUT + 1, (steps, blocks))
    return np.where(random.random((steps, blocks)) < share, 0, reused).astype(np.int8)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    steps, blocks = draw(st.integers(1, 24)), draw(st.integers(1, 7))
    return _random_plan(draw(st.integers(0, 999)), steps, blocks, draw(st.floats(0.0, 1.0)))


@settings(deadline=None)
@given(plan=plans())
def test_every_step_that_is_not_computed_entirely_has_its_turn_once(plan: Plan) -> None:
    incomplete = np.flatnonzero((plan != Reuse.COMPUTE).any(axis=1))
    assert sorted(refinement_steps(plan)) == incomplete.tolist()


@settings(deadline=None)
@given(plan=plans(), share=st.floats(0.0, 1.0))
def test_a_refined_plan_has_whole_passes_more_and_no_more_cells_than_allowed(
    plan: Plan, share: float
) -> None:
    own = int((plan == Reuse.COMPUTE).sum())
    cells = own + round(share * (plan.size - own))
    dense = refined(plan, cells)
    changed = plan != dense
    assert (dense[changed] == Reuse.COMPUTE).all()
    assert (dense[changed.any(axis=1)] == Reuse.COMPUTE).all()
    computed = int((dense == Reuse.COMPUTE).sum())
    assert computed <= cells
    assert cells - computed < plan.shape[1] or computed == plan.size


@pytest.mark.parametrize(('steps', 'count'), [(10, 2), (10, 5), (100, 2), (100, 7), (100, 20)])
def test_passes_are_added_where_a_static_schedule_leaves_most_time(steps: int, count: int) -> None:
    plan = static_plan(steps, 3, count)
    order = refinement_steps(plan)
    # Evenly spaced on the time scale of that schedule: a gap is halved before any twice.
    before = np.flatnonzero((plan == Reuse.COMPUTE).all(axis=1))
    wide = int((np.diff(before) > steps // 10).sum())
    gaps = np.searchsorted(before, order[:wide])
    assert len(set(gaps.tolist())) == wide


def test_ends_that_a_plan_leaves_open_are_closed_after_gaps_between_passes() -> None:
    plan = passes_plan(100, 4, [20, 60, 95])
    order = refinement_steps(plan)
    assert 20 < order[0] < 95 and 20 < order[1] < 95
    assert {0, 99} <= set(order)


def test_a_plan_of_scattered_cells_is_refined_between_its_densest_steps() -> None:
    plan = _random_plan(0, 20, 10, 0.0)
    plan[[6, 19], :4] = Reuse.COMPUTE
    plan[10, 0] = Reuse.COMPUTE
    order = refinement_steps(plan)
    assert 6 < order[0] < 19
    # After as many new passes as there were, theirs are completed.
    assert order[2:4] == [6, 19]


def test_cells_left_out_of_a_pass_wait_until_the_passes_have_doubled() -> None:
    plan = passes_plan(9, 4, [0, 4])
    plan[4, 1] = Reuse.FORWARD
    order = refinement_steps(plan)
    assert order[2] == 4 and sorted(order) == [1, 2, 3, 4, 5, 6, 7, 8]
