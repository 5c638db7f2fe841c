# SPDX-License-Identifier: Apache-2.0
"""The trajectory player keeps the promises of the stock joint trajectory controller."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tts_policy.sim.trajectory_player import TrajectoryError, TrajectoryPlayer, TrajectoryPoint

JOINTS = ('shoulder', 'elbow', 'finger')
MS = 1_000_000
NOW = 5_000 * MS

angle = st.floats(-3.0, 3.0)
angles = st.tuples(angle, angle, angle)
steps = st.lists(st.integers(1, 500), min_size=1, max_size=6)


def player(start: tuple[float, ...] = (0.0, 0.0, 0.0)) -> TrajectoryPlayer:
    return TrajectoryPlayer(JOINTS, dict(zip(JOINTS, start, strict=True)))


def values(p: TrajectoryPlayer, now: int) -> list[float]:
    return [p.set_points(now)[name] for name in JOINTS]


def points_of(durations_ms: list[int], draw_positions: list[tuple[float, ...]]):
    due, points = 0, []
    for duration, positions in zip(durations_ms, draw_positions, strict=False):
        due += duration * MS
        points.append(TrajectoryPoint(due, positions))
    return points


@given(steps, st.lists(angles, min_size=6, max_size=6), angles, st.booleans())
def test_set_point_passes_through_every_point_and_holds_the_last(durations, where, start, cubic):
    p = player(start)
    points = points_of(durations, where)
    if cubic:
        zero = (0.0, 0.0, 0.0)
        points = [TrajectoryPoint(x.time_from_start_ns, x.positions, zero) for x in points]
    p.accept(JOINTS, points, NOW, NOW)
    assert values(p, NOW) == pytest.approx(start)
    for point in points:
        assert values(p, NOW + point.time_from_start_ns) == pytest.approx(list(point.positions))
    later = NOW + points[-1].time_from_start_ns + 10_000 * MS
    assert values(p, later) == pytest.approx(list(points[-1].positions))


@given(angles, angles, st.integers(0, 100))
def test_linear_motion_starts_at_the_current_set_point(start, goal, percent):
    p = player(start)
    p.accept(JOINTS, [TrajectoryPoint(100 * MS, goal)], NOW, NOW)
    share = percent / 100
    expected = [a + share * (b - a) for a, b in zip(start, goal, strict=True)]
    assert values(p, NOW + percent * MS) == pytest.approx(expected, abs=1e-9)


@given(st.permutations(range(3)), angles)
def test_joints_are_mapped_by_name(order, goal):
    p = player()
    names = [JOINTS[i] for i in order]
    p.accept(names, [TrajectoryPoint(50 * MS, [goal[i] for i in order])], NOW, NOW)
    assert values(p, NOW + 50 * MS) == pytest.approx(list(goal))


@given(angles, angles, angles, st.integers(1, 99))
def test_a_new_message_replaces_the_old_without_a_jump(start, first, second, elapsed_ms):
    p = player(start)
    p.accept(JOINTS, [TrajectoryPoint(100 * MS, first)], NOW, NOW)
    then = NOW + elapsed_ms * MS
    before = values(p, then)
    p.accept(JOINTS, [TrajectoryPoint(80 * MS, second)], then, then)
    assert values(p, then) == pytest.approx(before)
    assert values(p, then + 80 * MS) == pytest.approx(list(second))


@given(angles, angles, angles)
def test_a_first_point_in_the_past_makes_it_jump(start, first, second):
    p = player(start)
    points = [TrajectoryPoint(10 * MS, first), TrajectoryPoint(110 * MS, second)]
    p.accept(JOINTS, points, NOW - 60 * MS, NOW)
    expected = [a + 0.5 * (b - a) for a, b in zip(first, second, strict=True)]
    assert values(p, NOW) == pytest.approx(expected, abs=1e-9)


@given(angles, angles)
def test_cubic_motion_has_the_velocities_asked_for(first, speed):
    p = player()
    points = [
        TrajectoryPoint(100 * MS, first, speed),
        TrajectoryPoint(200 * MS, first, (0.0, 0.0, 0.0)),
    ]
    p.accept(JOINTS, points, NOW, NOW)
    tiny = MS // 1000
    due = NOW + 100 * MS
    ahead, behind = values(p, due + tiny), values(p, due - tiny)
    measured = [(a - b) / (2 * tiny * 1e-9) for a, b in zip(ahead, behind, strict=True)]
    assert measured == pytest.approx(list(speed), abs=1e-2)


def test_a_stamp_of_zero_means_now():
    p = player()
    p.accept(JOINTS, [TrajectoryPoint(50 * MS, (1.0, 1.0, 1.0))], 0, NOW)
    assert values(p, NOW + 25 * MS) == pytest.approx([0.5, 0.5, 0.5])


ONE = (1.0, 1.0, 1.0)
GOOD = [TrajectoryPoint(50 * MS, ONE)]


@pytest.mark.parametrize(
    ('names', 'points', 'start', 'reason'),
    [
        (('shoulder', 'elbow', 'wrist'), GOOD, NOW, r"once, got \['shoulder', 'elbow', 'wrist'\]"),
        (('shoulder', 'elbow'), GOOD, NOW, r"once, got \['shoulder', 'elbow'\]"),
        ((*JOINTS, 'finger'), GOOD, NOW, r"once, got \['shoulder', 'elbow', 'finger', 'finger'\]"),
        (JOINTS, [], NOW, 'expected at least one point'),
        (JOINTS, [TrajectoryPoint(MS, (1.0, 1.0))], NOW, 'expected 3 positions, got 2'),
        (JOINTS, [TrajectoryPoint(MS, ())], NOW, 'expected 3 positions, got 0'),
        (JOINTS, [TrajectoryPoint(MS, ONE, (0.0,))], NOW, 'expected 3 velocities, got 1'),
        (JOINTS, [TrajectoryPoint(MS, (1.0, math.nan, 1.0))], NOW, 'expected finite positions'),
        (
            JOINTS,
            [TrajectoryPoint(MS, ONE, (math.inf, 0.0, 0.0))],
            NOW,
            'expected finite velocities',
        ),
        (JOINTS, [TrajectoryPoint(-1, ONE)], NOW, 'at least 0, got -1 ns'),
        (JOINTS, [*GOOD, *GOOD], NOW, 'above 50000000 ns, got 50000000 ns'),
        (JOINTS, GOOD, NOW - 60 * MS, 'got one 0.010 s ago'),
        (JOINTS, [TrajectoryPoint(MS, ONE, (0.5, 0.0, 0.0))], NOW, 'expected zero velocities'),
    ],
)
def test_a_bad_trajectory_is_refused_in_one_line_and_changes_nothing(names, points, start, reason):
    p, untouched = player((0.2, 0.2, 0.2)), player((0.2, 0.2, 0.2))
    running = [TrajectoryPoint(100 * MS, (0.4, 0.4, 0.4))]
    for each in (p, untouched):
        each.accept(JOINTS, running, NOW - 50 * MS, NOW - 50 * MS)
    with pytest.raises(TrajectoryError, match=reason) as caught:
        p.accept(names, points, start, NOW)
    assert '\n' not in str(caught.value)
    for later in (0, 20, 50, 500):
        assert p.set_points(NOW + later * MS) == untouched.set_points(NOW + later * MS)
