# SPDX-License-Identifier: Apache-2.0
"""Plans that a search may start from: placed passes, refined plans, plans of other samplers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tts_policy.policy.plan import (
    Plan,
    Reuse,
    make_plan,
    passes_plan,
    resolve_sources,
    static_plan,
    static_steps,
)
from tts_policy.policy.pruner import Pruner, PrunerSpec
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.policy.schedulers.scheduler import SchedulerSpec
from tts_policy.train.plan_starts import (
    PriorPlans,
    carried_over,
    placed_passes,
    refined,
    refinement_steps,
)

BLOCKS = 6
KINDS = np.arange(BLOCKS) % 3


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


def levels(kind: str, steps: int) -> np.ndarray:
    return np.array(SchedulerSpec(kind, steps, 100).timesteps(), float)


@st.composite
def executable_plans(draw: st.DrawFn) -> Plan:
    steps = draw(st.sampled_from([2, 5, 10, 16, 100]))
    logits = draw(
        arrays.arrays(np.float32, (steps, BLOCKS, 4), elements=st.floats(-1, 1, width=32))
    )
    sparsity = draw(st.sampled_from([0.3, 0.5]))
    return make_plan(logits, sparsity, np.ones((steps, BLOCKS), bool), False, KINDS)


@given(executable_plans(), st.sampled_from([2, 5, 10, 16, 100]))
def test_a_plan_carried_over_computes_no_more_and_can_be_executed(plan: Plan, steps: int) -> None:
    made = carried_over(plan, levels('ddim', len(plan)), levels('ddim', steps), KINDS)
    resolve_sources(made, KINDS)
    assert (made == Reuse.COMPUTE).sum() <= (plan == Reuse.COMPUTE).sum()
    # The last computed feature of every block is still computed.
    assert ((made == Reuse.COMPUTE).any(0) == (plan == Reuse.COMPUTE).any(0)).all()
    if steps == len(plan):
        assert np.array_equal(made, plan)
    if steps > len(plan):
        assert (made == Reuse.COMPUTE).sum() == (plan == Reuse.COMPUTE).sum()


def test_computed_steps_go_to_the_nearest_noise_level() -> None:
    plan = static_plan(10, BLOCKS, 2)
    made = carried_over(plan, levels('ddim', 10), levels('ddpm', 100), KINDS)
    computed = np.flatnonzero((made == Reuse.COMPUTE).all(1))
    # Timesteps 90 and 0 of 99 to 0.
    assert computed.tolist() == [9, 99]
    assert set(np.unique(made[:9])) == {Reuse.ROLLOUT}
    assert set(np.unique(made[10:99])) == {Reuse.TIMESTEP}


@pytest.mark.parametrize(('steps', 'kind'), [(16, 'ddim'), (100, 'ddpm'), (10, 'ddim')])
def test_the_cells_asked_for_are_computed_whatever_the_steps(steps: int, kind: str) -> None:
    pruner = Pruner(PrunerSpec(10, BLOCKS, 8, 2, (0.5, 0.8)))
    torch.manual_seed(0)
    torch.nn.init.normal_(pruner.tables)
    prior = PriorPlans(pruner, SamplerSpec(SchedulerSpec('ddim', 10, 100), False))
    free = SamplerSpec(SchedulerSpec(kind, steps, 100), False)
    plans = prior.plans(12, free, KINDS)
    assert [int((plan == Reuse.COMPUTE).sum()) for plan in plans] == [12]
    # Between two tables both are starts.
    assert [int((p == Reuse.COMPUTE).sum()) for p in prior.plans(20, free, KINDS)] == [20, 20]
    # Cells of 60.5 % are rounded, and still those of the table for it.
    rounded = PriorPlans(Pruner(PrunerSpec(10, BLOCKS, 8, 2, (0.605, 0.8))), prior.sampler)
    assert len(rounded.plans(24, free, KINDS)) == 2
    # A forced step is a part of the budget.
    (forced,) = prior.plans(12, replace(free, force_first_step=True), KINDS)
    assert (forced[0] == Reuse.COMPUTE).all()
    assert 10 <= (forced == Reuse.COMPUTE).sum() <= 12


def test_a_sparser_table_is_a_start_beside_the_one_for_that_very_sparsity() -> None:
    pruner = Pruner(PrunerSpec(10, BLOCKS, 8, 2, (0.5, 0.8)))
    sampler = SamplerSpec(SchedulerSpec('ddim', 10, 100), False)
    everywhere = np.ones((10, BLOCKS), bool)
    torch.manual_seed(0)
    torch.nn.init.normal_(pruner.tables)
    own, grown = (
        make_plan(pruner.table(known).detach().numpy(), 0.5, everywhere, False, KINDS)
        for known in (0.5, 0.8)
    )
    plans = PriorPlans(pruner, sampler).plans(30, sampler, KINDS)
    assert np.array_equal(plans, [own, grown]) and not np.array_equal(own, grown)
