# SPDX-License-Identifier: Apache-2.0
"""Denser plans: whole passes between those that there are."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tts_policy.core.plan import Plan, Reuse, passes_plan, static_plan
from tts_policy.train.refinement import refined, refinement_order, refinement_steps


def _random_plan(seed: int, steps: int, blocks: int, share: float) -> Plan:
    random = np.random.default_rng(seed)
    reused = random.integers(Reuse.FORWARD, Reuse.ROLLOUT + 1, (steps, blocks))
    return np.where(random.random((steps, blocks)) < share, 0, reused).astype(np.int8)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    steps, blocks = draw(st.integers(1, 24)), draw(st.integers(1, 7))
    return _random_plan(draw(st.integers(0, 999)), steps, blocks, draw(st.floats(0.0, 1.0)))


@given(plan=plans())
def test_every_reused_cell_is_computed_at_some_time_and_steps_are_completed_one_by_one(
    plan: Plan,
) -> None:
    order = refinement_order(plan)
    assert sorted(order) == np.flatnonzero(plan != Reuse.COMPUTE).tolist()
    steps = (order // plan.shape[1]).tolist()
    assert list(dict.fromkeys(steps)) == refinement_steps(plan)
    changes = sum(a != b for a, b in itertools.pairwise(steps))
    assert changes == max(0, len(set(steps)) - 1)


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


@given(steps=st.integers(3, 100), count=st.integers(2, 20))
def test_a_new_pass_goes_into_the_middle_of_a_gap(steps: int, count: int) -> None:
    plan = static_plan(steps, 3, min(count, steps - 1))
    before = np.flatnonzero((plan == Reuse.COMPUTE).all(axis=1))
    (new,) = set(np.flatnonzero((refined(plan, (len(before) + 1) * 3) == 0).all(axis=1))) - {
        *before
    }
    time = 1 - np.sqrt(1 - np.arange(steps) / (steps - 1))
    distance = np.abs(time[:, None] - time[before]).min(axis=1)
    assert distance[new] == distance.max()


def test_cells_left_out_of_a_pass_wait_until_the_passes_have_doubled() -> None:
    plan = passes_plan(9, 4, [0, 4])
    plan[4, 1] = Reuse.FORWARD
    order = refinement_steps(plan)
    assert order[2] == 4 and sorted(order) == [1, 2, 3, 4, 5, 6, 7, 8]
