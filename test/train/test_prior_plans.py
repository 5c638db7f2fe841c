# SPDX-License-Identifier: Apache-2.0
"""Plans carried over from one number of denoising steps to another."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tts_policy.policy.plan import Plan, Reuse, make_plan, resolve_sources, static_plan
from tts_policy.policy.pruner import Pruner, PrunerSpec
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.policy.schedulers.scheduler import SchedulerSpec
from tts_policy.train.prior_plans import PriorPlans, carried_over

BLOCKS = 6
KINDS = np.arange(BLOCKS) % 3


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
