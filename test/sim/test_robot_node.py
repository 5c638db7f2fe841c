# SPDX-License-Identifier: Apache-2.0
"""The simulated robot over real topics, in a process of its own, on both clocks."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')
pytest.importorskip('robosuite', reason='robosuite is not installed')

from processes import BUSY_FACTOR
from sensor_msgs.msg import Image, JointState

from tts_policy.sim.panda import COMMAND_JOINTS, HOME_RAD, STATE_JOINTS

MS = 1_000_000
HOME = dict(zip(COMMAND_JOINTS, (*HOME_RAD, 0.04), strict=True))
MOVED = {**HOME, 'panda_joint1': 0.2, 'panda_finger_joint1': 0.01}


def ns(message) -> int:
    stamp = message.header.stamp
    return stamp.sec * 10**9 + stamp.nanosec


def moved(states) -> float:
    """How far any joint ever was from its first position."""
    positions = np.array([list(s.position) for s in states])
    return float(np.abs(positions - positions[0]).max())


@pytest.fixture(scope='module')
def lockstep(start_robot):
    return start_robot(clock='lockstep', seed=1000, episode_s=1.25, owed_timeout_s=8.0)


def run_to_the_end(robot, positions) -> list[int]:
    """Answer every tick with the same trajectory; returns the stamps of the ticks."""
    ticks: list[int] = []
    while True:
        due = (ticks[-1] + 400 * MS) if ticks else None
        robot.wait(
            lambda due=due: (
                robot.reports
                or (len(robot.images) > 1 and (due is None or ns(robot.images[-1]) >= due))
            )
        )
        if robot.reports:
            return ticks
        ticks.append(ns(robot.images[-1]))
        robot.command(ticks[-1], positions, (0.3,))


def test_nothing_is_published_before_the_first_reset(lockstep):
    assert not lockstep.wait(lambda: bool(lockstep.images or lockstep.states), 0.5)


def test_the_clock_is_held_at_the_tick_until_it_gets_what_it_is_owed(lockstep):
    assert lockstep.reset() == 'seed 1000'
    assert lockstep.wait(lambda: len(lockstep.images) == 2 and len(lockstep.states) == 6)
    start = ns(lockstep.images[0])
    assert start == 2_000 * MS
    tick = start + 50 * MS
    assert ns(lockstep.images[1]) == tick
    assert not lockstep.wait(lambda: len(lockstep.states) > 6, 0.7)

    lockstep.command(tick - 50 * MS, HOME, (0.3,))
    assert not lockstep.wait(lambda: len(lockstep.states) > 6, 0.5), 'another stamp released it'

    lockstep.command(tick, HOME)
    assert lockstep.wait(lambda: len(lockstep.images) == 10 and len(lockstep.states) == 46)
    assert not lockstep.wait(lambda: len(lockstep.states) > 46, 0.3)
    assert [ns(m) - start for m in lockstep.images] == [i * 50 * MS for i in range(10)]
    assert [ns(m) - start for m in lockstep.states] == [i * 10 * MS for i in range(46)]
    clocks = [c.clock.sec * 10**9 + c.clock.nanosec for c in lockstep.clocks]
    assert clocks == sorted(clocks)
    assert clocks[-1] == tick + 400 * MS


def test_an_episode_waits_for_those_who_are_to_hear_all_of_it(lockstep):
    lockstep.set_parameter('listeners', 2)
    lockstep.reset()
    assert not lockstep.wait(lambda: bool(lockstep.images or lockstep.states), 0.7)
    late = [
        lockstep.node.create_subscription(kind, topic, lambda message: None, 10)
        for kind, topic in ((Image, 'camera/image'), (JointState, 'joint_states'))
    ]
    assert lockstep.wait(lambda: len(lockstep.images) == 2 and len(lockstep.states) == 6)
    for subscription in late:
        lockstep.node.destroy_subscription(subscription)
    lockstep.set_parameter('listeners', 1)


def test_messages_have_the_shape_of_the_demonstrations(lockstep):
    lockstep.reset()
    assert lockstep.wait(lambda: len(lockstep.images) == 2 and len(lockstep.states) == 6)
    image, state = lockstep.images[0], lockstep.states[0]
    assert (image.encoding, image.height, image.width, image.step) == ('rgb8', 96, 96, 288)
    assert len(image.data) == 96 * 288
    assert tuple(state.name) == STATE_JOINTS
    assert list(state.position) == pytest.approx([*HOME_RAD, 0.04, 0.04], abs=1e-3)


BAD = {
    "'elbow'": {**{k: v for k, v in MOVED.items() if k != 'panda_joint7'}, 'elbow': 0.0},
    "'panda_joint3', 'panda_joint5'": {k: v for k, v in MOVED.items() if k != 'panda_joint4'},
    'expected finite positions': {**MOVED, 'panda_joint2': math.nan},
}


@pytest.mark.parametrize('reason', BAD)
def test_a_bad_trajectory_is_refused_and_moves_nothing(lockstep, reason):
    lockstep.reset()
    assert lockstep.wait(lambda: len(lockstep.images) == 2)
    tick = ns(lockstep.images[1])
    lockstep.command(tick, BAD[reason])
    assert lockstep.wait(lambda: reason in lockstep.log()), lockstep.log()
    lockstep.command(tick, MOVED, (0.05, 0.04))
    assert not lockstep.wait(lambda: len(lockstep.states) > 6, 0.4)
    lockstep.command(tick, HOME)
    assert lockstep.wait(lambda: len(lockstep.states) == 46)
    assert moved(lockstep.states) < 1e-3


def test_the_same_trajectories_give_the_same_episode(lockstep):
    runs = []
    for _ in range(2):
        lockstep.set_parameter('seed', 2000)
        assert lockstep.reset() == 'seed 2000'
        ticks = run_to_the_end(lockstep, MOVED)
        assert len(ticks) == 3
        report = lockstep.reports[-1]
        assert (report['seed'], report['success'], report['reason']) == (2000, False, 'time limit')
        assert report['duration_s'] == pytest.approx(1.25)
        lockstep.wait(lambda: len(lockstep.states) == 125)
        runs.append(
            ([list(s.position) for s in lockstep.states], [bytes(i.data) for i in lockstep.images])
        )
    assert runs[0] == runs[1]
    assert runs[0][0][-1][0] == pytest.approx(0.2, abs=0.01)
    assert runs[0][0][-1][7] == pytest.approx(0.01, abs=2e-3)


def test_the_world_is_held_after_the_end_and_every_reset_leaves_a_gap(lockstep):
    lockstep.reset()
    run_to_the_end(lockstep, HOME)
    lockstep.wait(lambda: len(lockstep.states) == 125)
    last = ns(lockstep.states[-1])
    held = len(lockstep.states)
    assert not lockstep.wait(lambda: len(lockstep.states) > held, 0.4)
    lockstep.reset()
    assert lockstep.wait(lambda: len(lockstep.images) > 0)
    assert ns(lockstep.images[0]) - last >= 1_000 * MS


def test_an_action_that_never_comes_ends_the_episode_as_failed(lockstep):
    lockstep.set_parameter('owed_timeout_s', 0.5)
    lockstep.reset()
    assert lockstep.wait(lambda: bool(lockstep.reports))
    assert not lockstep.reports[-1]['success']
    assert 'no trajectory for stamp' in lockstep.reports[-1]['reason']


def test_real_time_is_followed_and_nothing_waits_for_an_action(start_robot):
    robot = start_robot(seed=7, episode_s=2.0, reset_gap_s=0.5)
    before_ns = time.time_ns()
    assert robot.reset() == 'seed 7'
    assert robot.wait(lambda: len(robot.images) > 3)
    assert ns(robot.images[0]) - before_ns >= 500 * MS
    robot.command(ns(robot.images[-1]), MOVED, (0.3,))
    assert robot.wait(lambda: bool(robot.reports)), robot.log()
    took_ns = time.time_ns() - ns(robot.states[0])
    assert 1.9e9 < took_ns < BUSY_FACTOR * 4e9
    report = robot.reports[-1]
    assert (report['reason'], report['trajectories']) == ('time limit', 1)
    assert report['frames'] + report['dropped_frames'] == 40
    # A busy machine may drop messages on the way, but every stamp lies on the 10 ms grid.
    assert robot.wait(lambda: ns(robot.states[-1]) - ns(robot.states[0]) == 1990 * MS)
    steps = [ns(b) - ns(a) for a, b in itertools.pairwise(robot.states)]
    assert all(step > 0 and step % (10 * MS) == 0 for step in steps)
    assert len(robot.states) >= 100
    assert robot.states[-1].position[0] == pytest.approx(0.2, abs=0.01)
    assert not robot.clocks
    assert robot.stop() == 0


def test_a_wrong_clock_is_refused_by_name(start_robot):
    with pytest.raises(AssertionError, match="clock: expected realtime or lockstep, got 'fast'"):
        start_robot(clock='fast')
