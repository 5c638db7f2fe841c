# SPDX-License-Identifier: Apache-2.0
"""The schedule of launches against a plan walked cell by cell."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tts_policy.policy.engines.launch_schedule import launch_schedule
from tts_policy.policy.plan import Reuse, make_plan, resolve_sources


@given(
    seed=st.integers(0, 2**32 - 1),
    steps=st.integers(2, 6),
    kinds=st.lists(st.integers(0, 2), min_size=1, max_size=7),
    sparsity=st.floats(0.0, 1.0),
    force=st.booleans(),
)
def test_units_walk_the_plan_and_runs_name_every_reused_source_once(
    seed: int, steps: int, kinds: list[int], sparsity: float, force: bool
) -> None:
    of_kind, blocks = np.array(kinds), len(kinds)
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((steps, blocks, 4), np.float32)
    known = rng.random((steps, blocks)) < 0.5
    plan = make_plan(logits, sparsity * (1 - 1 / steps), known, force, of_kind)
    sources = resolve_sources(plan, of_kind)
    schedule = launch_schedule(plan, of_kind, int(force))
    units, runs = iter(schedule.units), iter(schedule.runs)
    add, end, reused_step = blocks, blocks + 1, blocks + 2
    for step in range(int(force), steps):
        block = 0
        if (plan[step] != Reuse.COMPUTE).all():
            assert next(units) == reused_step
            assert next(runs).tolist() == sources[step].tolist()
            continue
        while block < blocks:
            if plan[step, block] == Reuse.COMPUTE:
                assert next(units) == block
                block += 1
                continue
            assert next(units) == add
            row = next(runs).tolist()
            expected = [plan.size] * blocks
            while block < blocks and plan[step, block] != Reuse.COMPUTE:
                expected[block] = sources[step, block]
                block += 1
            assert row == expected
        assert next(units) == end
    assert next(units, None) is None and next(runs, None) is None
