# SPDX-License-Identifier: Apache-2.0
"""Compiled plans: what the operations add up to is what the plan says, and no more is done."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tts_policy.policy.engines.program import CONSTANT, Op, Program, compile_plan
from tts_policy.policy.plan import (
    Plan,
    PlanError,
    Reuse,
    dense_plan,
    make_plan,
    resolve_sources,
    static_plan,
)

SIX = np.arange(6) % 3


def random_plan(seed: int, steps: int, kinds: NDArray, sparsity: float, force: bool) -> Plan:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((steps, len(kinds), 4)).astype(np.float32)
    valid = rng.random((steps, len(kinds))) < 0.7
    return make_plan(logits, sparsity, valid, force, kinds)


def interpret(program: Program, plan: Plan) -> list[list[int]]:
    """Run a program on symbols: the rows that make up the tokens at the end of every step."""
    steps, blocks = plan.shape
    written = {int(cell) for cell in np.flatnonzero(plan != Reuse.COMPUTE)}
    batches = list(program.batch_rows())
    sums: list[list[int]] = []
    tokens: list[int] = []
    finished = []
    for op, argument in program.ops:
        match op:
            case Op.EMBED:
                tokens = [steps * blocks] if argument == CONSTANT else list(sums[argument])
            case Op.COMPUTE:
                written.add(argument)
                tokens.append(argument)
            case Op.ADD:
                tokens.extend(sums[argument])
            case Op.GATHER:
                rows, offsets = batches[argument]
                for part in np.split(rows, offsets[1:]):
                    # A row that is computed later in this tick still holds an older feature.
                    assert set(part.tolist()) <= written | {steps * blocks}
                    sums.append(part.tolist())
            case Op.FINISH:
                assert argument == len(finished)
                finished.append(tokens)
    return finished


@given(
    seed=st.integers(0, 2**32 - 1),
    steps=st.integers(2, 12),
    kinds=st.lists(st.integers(0, 3), min_size=1, max_size=9).map(np.array),
    share=st.floats(0, 1),
    force=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_every_step_adds_up_the_constant_and_one_source_per_block(
    seed: int, steps: int, kinds: NDArray, share: float, force: bool
) -> None:
    plan = random_plan(seed, steps, kinds, share * (1 - 1 / steps), force)
    expected = resolve_sources(plan, kinds)
    program = compile_plan(plan, kinds)
    for rows, sources in zip(interpret(program, plan), expected, strict=True):
        assert rows.count(plan.size) == 1
        assert [row for row in rows if row != plan.size] == sources.tolist()
    assert [op for op, _ in program.ops].count(Op.COMPUTE) == (plan == Reuse.COMPUTE).sum()


def test_a_dense_plan_forms_no_sums() -> None:
    program = compile_plan(dense_plan(3, 6), SIX)
    assert {op for op, _ in program.ops} == {Op.EMBED, Op.COMPUTE, Op.FINISH}
    assert program.rows.size == 0


def test_fully_reused_steps_are_an_embedding_and_an_end_with_one_sum_for_all() -> None:
    program = compile_plan(static_plan(20, 6, 1), SIX)
    assert program.ops[program.starts[1] : program.starts[2]] == [
        (Op.GATHER, 0),
        (Op.EMBED, 0),
        (Op.FINISH, 1),
    ]
    for step in range(2, 20):
        ops = program.ops[program.starts[step] : program.starts[step + 1]]
        assert ops == [(Op.EMBED, 0), (Op.FINISH, step)]
    assert program.offsets.tolist() == [0, 7]


def test_sums_of_an_earlier_tick_are_formed_in_one_batch() -> None:
    plan = np.full((5, 6), Reuse.ROLLOUT, np.int8)
    program = compile_plan(plan, SIX)
    assert [op for op, _ in program.ops].count(Op.GATHER) == 1
    assert len(program.offsets) == 1 + 5


def test_reuse_of_nothing_is_refused() -> None:
    plan = dense_plan(3, 6)
    plan[0, 1] = Reuse.TIMESTEP
    with pytest.raises(PlanError, match='TIMESTEP reuse at step 0, block 1'):
        compile_plan(plan, SIX)
