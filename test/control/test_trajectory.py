# SPDX-License-Identifier: Apache-2.0
"""Chunks become trajectories that start in the future and keep every limit, or are refused."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tts_policy.control.trajectory import (
    ChunkTooLate,
    Trajectory,
    TrajectoryRefused,
    hold_trajectory,
    plan_trajectory,
)

JOINTS = ('a', 'b')
PERIOD = 50_000_000
STAMP = 1_700_000_000_000_000_000
RAMP = np.stack([np.arange(15) * 0.01, 1.0 - np.arange(15) * 0.02], axis=1)


def plan(now_ns: int = STAMP, offset: int = 1, actions: np.ndarray = RAMP) -> Trajectory:
    return plan_trajectory(actions, JOINTS, PERIOD, offset, STAMP, now_ns)


def test_every_usable_action_is_due_offset_plus_index_periods_after_the_observation() -> None:
    got = plan()
    assert got.times_ns.tolist() == [(a + 1) * PERIOD for a in range(15)]
    assert np.array_equal(got.positions, RAMP)
    assert got.dropped == 0


def test_velocities_are_central_differences_with_rest_at_the_end() -> None:
    got = plan()
    assert np.allclose(got.velocities[:-1], [0.2, -0.4])
    assert got.velocities[-1].tolist() == [0.0, 0.0]
    late = plan(STAMP + 3 * PERIOD)
    assert np.array_equal(late.velocities, got.velocities[3:])


@pytest.mark.parametrize(
    ('offset', 'age_ns', 'dropped'),
    [
        (1, 0, 0),
        (1, PERIOD - 1, 0),
        (1, PERIOD, 1),
        (0, 0, 1),
        (0, 1, 1),
        (1, -3 * PERIOD, 0),
        (1, 15 * PERIOD - 1, 14),
    ],
)
def test_points_already_past_are_dropped_and_one_due_now_is_past(
    offset: int, age_ns: int, dropped: int
) -> None:
    got = plan(STAMP + age_ns, offset)
    assert got.dropped == dropped
    assert got.times_ns[0] > max(age_ns, 0)
    assert np.array_equal(got.positions[0], RAMP[dropped])


def test_a_chunk_that_is_wholly_past_is_refused() -> None:
    with pytest.raises(TrajectoryRefused, match='the last was due 0 ms ago'):
        plan(STAMP + 15 * PERIOD)
    with pytest.raises(TrajectoryRefused, match='the last was due 250 ms ago'):
        plan(STAMP + 20 * PERIOD)


@given(
    usable=st.integers(1, 40),
    period_ms=st.integers(1, 1000),
    offset=st.sampled_from([0, 1]),
    age_ms=st.integers(-1000, 60_000),
)
def test_times_are_positive_future_and_strictly_increasing(
    usable: int, period_ms: int, offset: int, age_ms: int
) -> None:
    period_ns, now_ns = period_ms * 1_000_000, STAMP + age_ms * 1_000_000
    actions = np.linspace(0.0, 1.0, usable)[:, None]
    last_due_ns = STAMP + (usable - 1 + offset) * period_ns
    try:
        got = plan_trajectory(actions, ('a',), period_ns, offset, STAMP, now_ns)
    except TrajectoryRefused:
        assert last_due_ns <= max(now_ns, STAMP)
        return
    times = got.times_ns.tolist()
    assert times[0] > 0
    assert all(b > a for a, b in pairwise(times))
    assert STAMP + times[0] > now_ns
    assert STAMP + times[-1] == last_due_ns
    assert got.velocities[-1].tolist() == [0.0]
    assert len(times) + got.dropped == usable


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_even_in_a_past_point(bad: float) -> None:
    actions = RAMP.copy()
    actions[0, 1] = bad
    with pytest.raises(TrajectoryRefused, match='b: expected finite set-points'):
        plan(STAMP + 5 * PERIOD, actions=actions)


@pytest.mark.parametrize('shape', [(15,), (0, 2), (15, 3)])
def test_chunks_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(TrajectoryRefused, match='got shape'):
        plan(actions=np.zeros(shape))


def test_hold_is_one_point_at_rest_in_the_future() -> None:
    hold = hold_trajectory(JOINTS, np.array([0.1, 0.2]), PERIOD)
    assert hold.positions.tolist() == [[0.1, 0.2]]
    assert hold.velocities.tolist() == [[0.0, 0.0]]
    assert hold.times_ns.tolist() == [PERIOD]


def test_set_points_between_points_are_interpolated_and_held_outside() -> None:
    got = plan()
    times = STAMP + np.array([0, 3 * PERIOD, 3 * PERIOD + PERIOD // 2, 99 * PERIOD])
    expected = [RAMP[0], RAMP[2], (RAMP[2] + RAMP[3]) / 2, RAMP[14]]
    assert np.allclose(got.positions_at(times), expected)


def test_some_joints_of_a_trajectory_keep_its_points() -> None:
    got = plan().of(['b'])
    assert got.joints == ('b',)
    assert np.array_equal(got.positions, RAMP[:, 1:])
    assert np.array_equal(got.times_ns, plan().times_ns)


def test_points_that_a_message_cannot_reach_in_time_are_dropped() -> None:
    got = plan_trajectory(RAMP, JOINTS, PERIOD, 1, STAMP, STAMP + PERIOD - 10, lead_ns=10)
    assert got.dropped == 1
    got = plan_trajectory(RAMP, JOINTS, PERIOD, 1, STAMP, STAMP + PERIOD - 11, lead_ns=10)
    assert got.dropped == 0


def test_a_chunk_with_fewer_points_than_the_floor_is_too_late() -> None:
    late = STAMP + 12 * PERIOD
    assert len(plan_trajectory(RAMP, JOINTS, PERIOD, 1, STAMP, late, 0, 3).times_ns) == 3
    with pytest.raises(ChunkTooLate, match=r'expected 4 set-points .* got 3: .* in 150 ms'):
        plan_trajectory(RAMP, JOINTS, PERIOD, 1, STAMP, late, 0, 4)
