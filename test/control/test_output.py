# SPDX-License-Identifier: Apache-2.0
"""From chunk to command: limits, blending and the hold point."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from output_bench import JOINTS, PERIOD, RAMP, REST, T0, Bench

from tts_policy.control.continuity import blend, measure
from tts_policy.control.output import hold_weights
from tts_policy.control.trajectory import ChunkTooLate, TrajectoryRefused, plan_trajectory


def test_chunks_go_to_the_robot_or_become_proposals() -> None:
    bench = Bench()
    bench.output.send(RAMP, T0, T0, enabled=False)
    bench.output.send(RAMP, T0, T0, enabled=True)
    assert len(bench.proposed.sent) == len(bench.command.sent) == 1


def test_nothing_is_sent_without_a_measured_state() -> None:
    bench = Bench()
    bench.output.begin()
    with pytest.raises(TrajectoryRefused, match='expected a measured joint state'):
        bench.output.send(RAMP, T0, T0, enabled=True)
    assert not bench.command.sent


@pytest.mark.fault
def test_nothing_is_sent_that_would_be_compared_with_a_state_of_long_ago() -> None:
    """The joints fell silent while the policy was inferring."""
    bench = Bench()
    with pytest.raises(TrajectoryRefused, match=r'state of at most 0\.250 s, got one of 0\.3'):
        bench.output.send(RAMP, T0, T0 + 6 * PERIOD, enabled=True)
    assert not bench.command.sent
    bench.output.measured(T0 + PERIOD, REST, T0 + PERIOD)
    assert bench.output.send(RAMP, T0, T0 + 6 * PERIOD, enabled=True)


def test_a_start_begins_with_the_first_point_that_can_be_reached_in_time() -> None:
    bench = Bench(velocity=1.0)
    away = RAMP + np.array([0.2, 0.0, 0.0])
    sent = bench.output.send(away, T0, T0 + PERIOD // 2, enabled=True)
    # From -0.01 to 0.20 + 0.01 a at 1 rad/s, with 25 ms of the first 50 ms gone.
    assert sent.trajectory.dropped == 5
    reach = (sent.trajectory.positions[0, 0] - REST[0]) / 0.275
    assert reach <= 1.0 < (away[4, 0] - REST[0]) / 0.225


def test_a_start_that_is_out_of_reach_is_refused_by_name() -> None:
    bench = Bench(velocity=1.0, min_points=4)
    with pytest.raises(TrajectoryRefused, match=r'a: expected velocity at most 1\.0, got 10\.2'):
        bench.output.send(RAMP + np.array([0.5, 0.0, 0.0]), T0, T0, enabled=True)
    assert not bench.command.sent


def test_a_start_begins_with_the_first_point_that_the_acceleration_allows() -> None:
    bench = Bench(acceleration=5.0)
    away = RAMP * [0.0, 0.0, 1.0] + [0.1, 0.02, 0.0]
    sent = bench.output.send(away, T0, T0, enabled=True)
    # 0.11 rad from rest: 2 * 0.11 / t^2 is 5.5 rad/s^2 after four periods, 3.5 after five.
    assert sent.trajectory.dropped == 4


@pytest.mark.fault
def test_a_start_that_takes_too_much_acceleration_is_refused() -> None:
    bench = Bench(acceleration=0.2, min_points=4)
    with pytest.raises(TrajectoryRefused, match=r'a: expected acceleration at most 0\.2, got'):
        bench.output.send(RAMP * [0.0, 0.0, 1.0] + [0.2, 0.02, 0.0], T0, T0, enabled=True)


@pytest.mark.fault
def test_a_chunk_that_turns_the_arm_around_at_once_is_refused() -> None:
    """Both chunks move evenly: only where one takes over from the other is there a change."""
    now = T0 + 8 * PERIOD
    back = RAMP[7] - (RAMP[1] - RAMP[0]) - (RAMP - RAMP[0])
    # From 0.4 rad/s to -0.4 rad/s within a period of 0.05 s.
    gentle, strong = Bench(acceleration=12.0), Bench(acceleration=17.0)
    for bench in (gentle, strong):
        bench.output.send(RAMP, T0, T0, enabled=True)
        bench.output.measured(now, RAMP[7], now)
    assert strong.output.send(back, now, now, enabled=True)
    with pytest.raises(TrajectoryRefused, match=r'b: expected acceleration at most 12\.0, got 16'):
        gentle.output.send(back, now, now, enabled=True)


def test_a_joint_state_that_comes_out_of_order_is_not_the_measured_one() -> None:
    bench = Bench()
    bench.output.send(RAMP, T0, T0, enabled=True)
    bench.output.measured(T0 - PERIOD, REST + 1.0, T0)
    bench.output.hold(T0)
    assert np.allclose(bench.command.finished[0].positions[0][:2], REST[:2])
    # Far behind means that the clock was set back.
    bench.output.measured(T0 - 100 * PERIOD, REST + 1.0, T0 - 100 * PERIOD)
    bench.output.send(RAMP, T0 - 100 * PERIOD, T0 - 100 * PERIOD, enabled=True)
    bench.output.hold(T0 - 100 * PERIOD)
    assert np.allclose(bench.command.finished[1].positions[0][:2], REST[:2] + 1.0)


@pytest.mark.fault
def test_a_joint_state_ahead_of_the_clock_hides_none_that_comes_later() -> None:
    bench = Bench()
    bench.output.measured(T0 + 4 * PERIOD, REST + 5.0, T0)
    now = T0 + PERIOD
    bench.output.measured(now, RAMP[0], now)
    bench.output.send(RAMP, now, now, enabled=True)
    bench.output.hold(now)
    assert np.allclose(bench.command.finished[0].positions[0][:2], RAMP[0][:2])


@pytest.mark.fault
def test_a_joint_state_ahead_of_the_clock_is_no_younger_than_when_it_came() -> None:
    bench = Bench()
    bench.output.measured(T0 + 200 * PERIOD, REST, T0)
    bench.output.send(RAMP, T0, T0, enabled=True)
    later = T0 + 10 * PERIOD
    with pytest.raises(TrajectoryRefused, match=r'state of at most 0\.250 s, got one of 0\.500 s'):
        bench.output.send(RAMP, later, later, enabled=True)
    # Where the arm was half a second ago is no place to go back to.
    assert bench.output.hold(later)
    assert np.allclose(bench.command.finished[0].positions[0], RAMP[9])


def test_committed_are_the_set_points_in_force_until_the_next_chunk_comes() -> None:
    bench = Bench()
    assert bench.output.committed(T0, 0, True, soft=True) is None
    bench.output.send(RAMP, T0, T0, enabled=True)
    hard = bench.output.committed(T0 + 8 * PERIOD, 3 * PERIOD, True, soft=False)
    assert hard is not None
    # Seven points of the old chunk are still to come, three of them before the next one does.
    assert hard.weights.tolist() == [1, 1, 1, 0, 0, 0, 0]
    assert np.allclose(hard.actions, RAMP[8:])
    soft = bench.output.committed(T0 + 8 * PERIOD, 3 * PERIOD, True, soft=True)
    assert soft is not None and (np.diff(soft.weights[2:]) < 0).all()


def test_nothing_is_committed_that_the_arm_does_not_follow() -> None:
    bench = Bench()
    bench.output.send(RAMP, T0, T0, enabled=False)
    assert bench.output.committed(T0 + PERIOD, PERIOD, True, soft=False) is None
    bench.output.send(RAMP, T0, T0, enabled=True)
    assert bench.output.committed(T0 + PERIOD, PERIOD, False, soft=False) is None
    assert bench.output.committed(T0 + 15 * PERIOD, PERIOD, True, soft=False) is None
    assert bench.output.committed(T0 - PERIOD, PERIOD, True, soft=False) is None
    assert bench.output.committed(T0 + PERIOD, 0, True, soft=False) is None


@pytest.mark.fault
def test_a_chunk_that_is_stamped_ahead_of_the_clock_is_refused() -> None:
    bench = Bench()
    with pytest.raises(TrajectoryRefused, match=r'ahead of the clock, got one stamped 0\.050 s'):
        bench.output.send(RAMP, T0 + PERIOD, T0, enabled=True)
    assert not bench.command.sent


def test_a_late_chunk_is_refused_and_the_old_one_stays_in_force() -> None:
    bench = Bench(min_points=4)
    bench.output.send(RAMP, T0, T0, enabled=True)
    with pytest.raises(ChunkTooLate):
        bench.output.send(RAMP, T0 + PERIOD, T0 + 13 * PERIOD, enabled=True)
    assert len(bench.command.sent) == 1
    bench.output.measured(T0, REST, T0)
    assert bench.output.hold(T0 + 13 * PERIOD)
    # The measured state is too old to go back to: the set-point in force is held.
    assert np.allclose(bench.command.finished[0].positions[0], RAMP[12])


def test_hold_keeps_the_grip_and_stops_the_arm_where_it_is_once() -> None:
    bench = Bench()
    assert not bench.output.hold(T0)
    bench.output.send(RAMP, T0, T0, enabled=False)
    assert not bench.output.hold(T0)
    bench.output.send(RAMP + [0, 0, -0.03], T0, T0, enabled=True)
    bench.output.measured(T0 + PERIOD, REST, T0 + PERIOD)
    assert bench.output.hold(T0 + PERIOD)
    (hold,) = bench.command.finished
    assert hold.positions[0] == pytest.approx([-0.01, 0.02, 0.01])
    assert not bench.output.hold(T0 + PERIOD)


HOLD = 100_000_000


@pytest.mark.fault
@pytest.mark.parametrize('glitch', [2.5, -2.5, 0.3, 1e39])
def test_a_measured_state_out_of_reach_is_not_believed_when_the_arm_has_to_stop(
    glitch: float,
) -> None:
    bench = Bench(velocity=1.0, hold_ns=HOLD)
    bench.output.send(RAMP, T0, T0, enabled=True)
    now = T0 + 8 * PERIOD
    bench.output.measured(now, RAMP[7] + [glitch, 0.0, 0.0], now)
    assert bench.output.hold(now)
    (hold,) = bench.command.finished
    # 0.2 and -0.4 rad/s come to rest evenly within 0.1 s.
    assert hold.positions[0] == pytest.approx(RAMP[7] + [0.01, -0.02, 0.0])
    assert hold.times_ns.tolist() == [HOLD]


@pytest.mark.fault
def test_joints_that_fell_silent_in_motion_do_not_make_the_arm_go_back() -> None:
    bench = Bench(velocity=1.0, hold_ns=HOLD)
    fast = RAMP * [4.0, 0.0, 1.0]
    bench.output.send(fast, T0, T0, enabled=True)
    bench.output.measured(T0 + 4 * PERIOD, fast[3], T0 + 4 * PERIOD)
    now = T0 + 8 * PERIOD + 20_000_000
    assert bench.output.hold(now)
    (hold,) = bench.command.finished
    assert hold.positions[0, 0] == pytest.approx(fast[7, 0] + 0.8 * 0.02 + 0.8 * 0.05)


@pytest.mark.fault
def test_a_stop_takes_as_long_as_the_acceleration_asks_for() -> None:
    bench = Bench(velocity=1.0, acceleration=2.0, hold_ns=HOLD)
    slope = 0.8 * np.arange(1, 16)[:, None] * PERIOD * 1e-9 * [1.0, 0.0, 0.0]
    bench.output.send(REST + slope**2, T0, T0, enabled=True)
    now = T0 + 10 * PERIOD
    _, velocity = bench.output._commanded.state_at(now)
    assert bench.output.hold(now)
    (hold,) = bench.command.finished
    assert hold.times_ns[0] == pytest.approx(velocity[0] / 2.0 * 1e9)


@pytest.mark.fault
@pytest.mark.parametrize('noise', [0.0, 1e-7])
def test_states_that_stand_still_while_the_arm_is_commanded_to_move_stop_it(noise: float) -> None:
    bench = Bench(velocity=1.0, hold_ns=HOLD, frozen_ns=300_000_000)
    bench.output.send(RAMP, T0, T0, enabled=True)
    for step in range(1, 11):
        now = T0 + step * PERIOD
        bench.output.measured(now, REST + noise * (step % 2), now)
    # 0.4 rad/s: 0.02 rad are commanded after 0.05 s, and 0.3 s later none of it was seen.
    assert len(bench.command.finished) == (noise == 0.0)
    if noise == 0.0:
        with pytest.raises(TrajectoryRefused, match='expected motion as commanded, got the same'):
            bench.output.send(RAMP, now, now, enabled=True)
        assert bench.command.finished[0].positions[0, 1] < -0.05  # where the arm may well be
        later = now + 4 * PERIOD
        bench.output.measured(later, REST + 1e-7, later)
        assert bench.output.send(RAMP, later, later, enabled=True)


def test_an_arm_that_is_commanded_to_rest_may_stand_still() -> None:
    bench = Bench(hold_ns=HOLD, frozen_ns=300_000_000)
    for step in range(0, 40, 8):
        now = T0 + step * PERIOD
        bench.output.measured(now, REST, now)
        bench.output.send(np.repeat(REST[None], 15, axis=0), now, now, enabled=True)
    assert not bench.command.finished


@pytest.mark.fault
def test_the_cubic_between_two_points_stays_within_the_position_bounds() -> None:
    """The points keep the bound; what a controller interpolates between them has to as well."""
    bench = Bench(upper=0.5)
    rise = np.clip(np.arange(15) * 0.06 - 0.02, 0.0, 0.5)[:, None] * [1.0, 0.0, 0.0]
    rise[10:, 0] = 0.49
    sent = bench.output.send(rise, T0, T0, enabled=True).trajectory
    times_s = np.linspace(0.0, 15 * PERIOD * 1e-9, 600)
    path = [sent.state_at(T0 + round(time_s * 1e9))[0][0] for time_s in times_s]
    assert max(path) <= 0.5 + 1e-9
    assert np.allclose(sent.positions, rise)


@pytest.mark.fault
@pytest.mark.parametrize('chunk', [RAMP, RAMP * np.nan])
def test_a_gate_found_closed_by_a_chunk_holds_before_anything_is_proposed(
    chunk: np.ndarray,
) -> None:
    bench = Bench()
    bench.output.send(RAMP, T0, T0, enabled=True)
    try:
        bench.output.send(chunk, T0 + PERIOD, T0 + PERIOD, enabled=False)
    except TrajectoryRefused:
        assert not bench.proposed.sent
    assert len(bench.command.finished) == 1
    assert not bench.output.hold(T0 + 2 * PERIOD)


def test_the_step_from_the_old_chunk_to_the_new_one_is_bounded() -> None:
    bench = Bench(velocity=1.0)
    bench.output.send(RAMP, T0, T0, enabled=True)
    now = T0 + 8 * PERIOD
    bench.output.measured(now, RAMP[8], now)
    bench.output.send(RAMP[::-1] * 0 + RAMP[8], now, now, enabled=True)
    with pytest.raises(TrajectoryRefused, match='a: expected velocity at most'):
        bench.output.send(RAMP * 0 + 0.2, now + PERIOD, now + PERIOD, enabled=True)


@pytest.mark.fault
@pytest.mark.parametrize('jump', [0.02, -0.03])
def test_the_way_from_the_set_point_in_force_is_bounded_by_the_time_that_is_left(
    jump: float,
) -> None:
    bench = Bench(velocity=1.0)
    bench.output.send(RAMP, T0, T0, enabled=True)
    # The second chunk goes on as the first, but beside it, and its first point is due in 10 ms.
    stamp, now = T0 + 7 * PERIOD, T0 + 8 * PERIOD - 10_000_000
    bench.output.measured(now, RAMP[7], now)
    sent = bench.output.send(RAMP + RAMP[7] + [jump, 0, 0], stamp, now, enabled=True).trajectory
    assert sent.dropped == 1
    first_ns = sent.stamp_ns + sent.times_ns[0]
    in_force = np.interp(now, T0 + PERIOD * np.arange(1, 16), RAMP[:, 0])
    rate = (sent.positions[0, 0] - in_force) / (first_ns - now) * 1e9
    assert abs(rate) <= 1.0


def test_a_clock_that_jumped_back_takes_nothing_over_from_the_future() -> None:
    bench = Bench(velocity=1.0)
    bench.output.send(RAMP, T0, T0, enabled=True)
    before = T0 - 100 * PERIOD
    bench.output.measured(before, REST + 5.0, before)
    sent = bench.output.send(RAMP + 5.0, before, before, enabled=True)
    assert sent.continuity.jump == 0.0


def test_a_chunk_after_the_end_of_the_old_one_is_a_new_start() -> None:
    bench = Bench(velocity=1.0)
    bench.output.send(RAMP, T0, T0, enabled=True)
    late = T0 + 15 * PERIOD
    bench.output.measured(late, REST, late)
    with pytest.raises(TrajectoryRefused, match='velocity'):
        bench.output.send(RAMP + 0.5, late, late, enabled=True)
    assert bench.output.send(RAMP + 0.5, late + 1, late + 1, enabled=True).continuity.jump == 0.0


def test_blending_begins_on_the_old_set_points_and_ends_on_the_new_ones() -> None:
    bench = Bench()
    bench.output.send(RAMP, T0, T0, enabled=True)
    shifted = RAMP[8:9] + RAMP * 0.5 + [0.05, 0.0, 0.0]
    now = T0 + 8 * PERIOD + 10_000_000
    bench.output.measured(now, RAMP[8], now)
    hard = bench.output.send(shifted, T0 + 8 * PERIOD, now, enabled=True)
    bench = Bench()
    bench.output.blend_ns = 4 * PERIOD
    bench.output.send(RAMP, T0 - 4 * PERIOD, T0 - 4 * PERIOD, enabled=True)
    bench.output.send(RAMP, T0, T0, enabled=True)
    bench.output.measured(now, RAMP[8], now)
    soft = bench.output.send(shifted, T0 + 8 * PERIOD, now, enabled=True)
    assert soft.continuity.jump < 0.2 * hard.continuity.jump
    assert soft.continuity.velocity_jump < 0.5 * hard.continuity.velocity_jump
    late = (soft.trajectory.times_ns - 10_000_000) >= 4 * PERIOD
    assert np.allclose(soft.trajectory.positions[late], hard.trajectory.positions[late])
    assert soft.trajectory.velocities[-1].tolist() == [0.0, 0.0, 0.0]


@given(
    shift=st.floats(-1.0, 1.0),
    age_ms=st.integers(0, 300),
    blend_ms=st.integers(1, 400),
)
def test_a_blended_path_lies_between_old_and_new_and_is_continuous(
    shift: float, age_ms: int, blend_ms: int
) -> None:
    now = T0 + age_ms * 1_000_000
    old = plan_trajectory(RAMP, JOINTS, PERIOD, 1, T0 - 8 * PERIOD, T0 - 8 * PERIOD)
    new = plan_trajectory(RAMP + RAMP[7] + shift, JOINTS, PERIOD, 1, T0, now)
    got = blend(new, old.positions_at, now, blend_ms * 1_000_000)
    before = old.positions_at(new.stamp_ns + new.times_ns)
    low, high = np.minimum(before, new.positions), np.maximum(before, new.positions)
    assert (got.positions >= low - 1e-12).all()
    assert (got.positions <= high + 1e-12).all()
    # A smoothstep moves at most 1.5 times as fast as a straight line over the same time.
    lead_s = (new.times_ns[0] + T0 - now) * 1e-9
    pace = 1.5 * np.abs(new.positions - before).max() / (blend_ms * 1e-3)
    assert np.abs(got.positions[0] - before[0]).max() <= pace * lead_s + 1e-9
    assert np.isfinite(got.velocities).all()


def test_a_chunk_that_continues_the_old_one_has_no_jump() -> None:
    old = plan_trajectory(RAMP, JOINTS, PERIOD, 1, T0, T0)
    new = plan_trajectory(
        RAMP + RAMP[4] - RAMP[0], JOINTS, PERIOD, 1, T0 + 4 * PERIOD, T0 + 4 * PERIOD
    )
    got = measure(new, old.positions_at, PERIOD)
    assert got.jump == pytest.approx(0.0, abs=1e-12)
    assert got.velocity_jump == pytest.approx(0.0, abs=1e-9)
    assert got.jerk == pytest.approx(0.0, abs=1e-6)


def test_weights_hold_what_is_committed_and_decay_over_the_overlap() -> None:
    assert hold_weights(2, 5, soft=False).tolist() == [1, 1, 0, 0, 0]
    soft = hold_weights(2, 5, soft=True)
    assert soft[:2].tolist() == [1, 1]
    assert (np.diff(soft[1:]) < 0).all() and soft[-1] > 0
    assert hold_weights(5, 5, soft=True).tolist() == [1] * 5
