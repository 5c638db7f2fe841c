# SPDX-License-Identifier: Apache-2.0
"""Plans: the budget, the validity of every reuse, and what a plan resolves to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tts_policy.policy.plan import (
    REUSE_COLOURS,
    PlanError,
    Reuse,
    make_plan,
    plan_rgb,
    realised_sparsity,
    resolve_sources,
    static_plan,
    static_steps,
)

THREE = np.arange(3)


@st.composite
def problems(draw: st.DrawFn) -> tuple[NDArray, float, NDArray, bool, NDArray]:
    steps = draw(st.integers(2, 8))
    # Any stack: kinds need neither repeat nor take turns.
    kinds = np.array(draw(st.lists(st.integers(0, 3), min_size=1, max_size=9)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.standard_normal((steps, len(kinds), 4)).astype(np.float32)
    rollout = rng.random((steps, len(kinds))) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    sparsity = draw(st.floats(0.0, 1 - 1 / steps))
    return logits, sparsity, rollout, draw(st.booleans()), kinds


@given(problems())
@settings(max_examples=200, deadline=None)
def test_every_reuse_has_a_source_and_the_budget_is_met(
    problem: tuple[NDArray, float, NDArray, bool, NDArray],
) -> None:
    logits, sparsity, rollout, force, kinds = problem
    plan = make_plan(logits, sparsity, rollout, force, kinds)
    steps, blocks = plan.shape
    budget = round((1 - sparsity) * steps * blocks)
    computed = plan == Reuse.COMPUTE
    assert computed.sum() >= budget
    if rollout.all():
        assert computed.sum() == budget
    if force:
        assert computed[0].all()
    assert rollout[plan == Reuse.ROLLOUT].all()
    last_of_kind: dict[int, tuple[int, int]] = {}
    last_of_block: dict[int, tuple[int, int]] = {}
    sources = resolve_sources(plan, kinds)
    for i in range(steps):
        for b in range(blocks):
            source = divmod(int(sources[i, b]), blocks)
            if computed[i, b]:
                last_of_kind[kinds[b]] = last_of_block[b] = (i, b)
                assert source == (i, b)
            elif plan[i, b] == Reuse.FORWARD:
                assert source == last_of_kind[kinds[b]]
            elif plan[i, b] == Reuse.TIMESTEP:
                assert source == last_of_block[b]
            else:
                assert source == (i, b)


@given(problems())
@settings(max_examples=50, deadline=None)
def test_sparsity_zero_computes_everything(
    problem: tuple[NDArray, float, NDArray, bool, NDArray],
) -> None:
    logits, _, rollout, force, kinds = problem
    assert (make_plan(logits, 0.0, rollout, force, kinds) == Reuse.COMPUTE).all()


def test_largest_margin_is_computed_and_best_valid_class_reused() -> None:
    logits = np.zeros((2, 3, 4), np.float32)
    logits[1, 2, Reuse.COMPUTE] = 5.0
    logits[1, :, Reuse.ROLLOUT] = 1.0
    logits[1, :, Reuse.TIMESTEP] = 0.5
    plan = make_plan(logits, 1 - 4 / 6, np.array([[True] * 3, [False, True, True]]), True, THREE)
    assert plan.tolist() == [[0, 0, 0], [Reuse.TIMESTEP, Reuse.ROLLOUT, Reuse.COMPUTE]]


def test_budget_below_the_forced_step_is_refused_with_the_limit() -> None:
    with pytest.raises(
        PlanError, match=r'sparsity: expected at most 0\.75 with step 0 computed, got 0\.9'
    ):
        make_plan(np.zeros((4, 3, 4), np.float32), 0.9, np.ones((4, 3), bool), True, THREE)


def test_a_reuse_without_source_is_refused_by_name() -> None:
    plan = np.zeros((2, 3), np.int8)
    plan[0, 1] = Reuse.TIMESTEP
    with pytest.raises(PlanError, match='TIMESTEP reuse at step 0, block 1'):
        resolve_sources(plan, THREE)


def test_unknown_class_is_refused() -> None:
    with pytest.raises(PlanError, match=r'plan: expected classes in \[0, 3\], got 4 to 4'):
        resolve_sources(np.full((2, 3), 4, np.int8), THREE)


@given(st.integers(1, 100), st.integers(1, 100))
def test_static_schedule_has_the_steps_asked_for(steps: int, count: int) -> None:
    chosen = static_steps(steps, count)
    assert len(chosen) == min(steps, count) == len(set(chosen.tolist()))
    assert chosen[0] == 0 and chosen.max() < steps


def test_static_schedule_is_denser_toward_the_end() -> None:
    gaps = np.diff(static_steps(100, 7))
    assert (np.diff(gaps) <= 0).all() and gaps[0] > 3 * gaps[-1]
    assert realised_sparsity(static_plan(100, 24, 5)) == pytest.approx(0.95)


def test_every_class_has_a_colour_of_its_own() -> None:
    colours = plan_rgb([list(Reuse)])
    assert colours.shape == (1, 4, 3) and colours.dtype == np.uint8
    assert [f'#{bytes(colour).hex().upper()}' for colour in colours[0]] == list(REUSE_COLOURS)
    assert len(set(REUSE_COLOURS)) == len(Reuse)
