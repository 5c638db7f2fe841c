# SPDX-License-Identifier: Apache-2.0
"""Processes that stop, die and come back, and a clock that jumps."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')
pytest.importorskip('torch', reason='torch is not installed')

from cell import FOLDER, held, moving, own_node, reported, start_node
from processes import BUSY_FACTOR, END_LIMIT_S, RosProcess, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from feeder import Feeder
    from rclpy.node import Node
    from sensor_msgs.msg import JointState

pytestmark = pytest.mark.fault

NAMESPACE = '/process_faults'


def test_a_node_that_stood_still_sends_nothing_late(arm: Feeder, process: RosProcess) -> None:
    for pause_s in (0.3, 1.0):
        process.send(signal.SIGSTOP)
        time.sleep(pause_s)
        process.send(signal.SIGCONT)
        moving(arm)


def test_a_robot_that_is_killed_and_comes_back_is_waited_for(
    test_node: Node, small_bundle: Path
) -> None:
    namespace = '/killed_robot'
    # On a quiet machine the robot is back within 2 s.
    process, feeder, witness = own_node(test_node, small_bundle, namespace, gap_limit_s=1.0)
    robots = [RosProcess('feeder', namespace, PYTHONPATH=FOLDER)]
    try:
        moving(feeder)
        robots[0].send(signal.SIGKILL)
        robots[0].wait(BUSY_FACTOR * 5.0)
        reported(feeder, 'camera: nothing for')
        feeder.silent()
        robots.append(RosProcess('feeder', namespace, PYTHONPATH=FOLDER))
        moving(feeder)
        assert 'gap' in next(tick['reset'] for tick in feeder.ticks if tick['reset'])
        assert witness.assert_safe() >= 4
    finally:
        for robot in robots:
            robot.stop()
        assert process.stop() == 0


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_node_that_ends_in_motion_leaves_an_arm_that_stops_and_can_be_taken_up_again(
    test_node: Node, small_bundle: Path, number: signal.Signals
) -> None:
    namespace = f'/ended_by_{number.name.lower()}'
    process, feeder, witness = own_node(test_node, small_bundle, namespace)
    feeder.start()
    try:
        moving(feeder)
        process.send(number)
        process.wait(BUSY_FACTOR * 5.0)
        if number is not signal.SIGKILL:
            held(feeder)
        # Without a word from the node its last chunk ends at rest.
        assert not any(feeder.commands[-1].points[-1].velocities)
        feeder.forget()
        process = start_node(small_bundle, namespace)
        wait_until(lambda: len(feeder.commands) >= 2, 20, f'commands\n{process.output}')
        assert witness.assert_safe() >= 4
    finally:
        feeder.stop()
        assert process.stop() == 0


def test_a_node_that_is_told_to_stop_while_it_loads_does_so_at_once(small_bundle: Path) -> None:
    process = start_node(small_bundle, '/loading', load_s='120')
    try:
        wait_until(lambda: 'loading' in process.output, 20, 'a node that loads')
        process.send(signal.SIGINT)
        assert process.wait(BUSY_FACTOR * END_LIMIT_S) == 0, process.output
    finally:
        process.send(signal.SIGKILL)
    assert 'configure failed: told to stop while loading' in process.output


def test_a_dead_mans_switch_that_falls_silent_stops_the_arm(
    test_node: Node, small_bundle: Path
) -> None:
    process, feeder, witness = own_node(
        test_node, small_bundle, '/dead_man', emergency_stop_timeout_s=0.5
    )
    alive = [True]

    def beat(message: JointState) -> JointState:
        if alive[0]:
            feeder.emergency_stop(False)
        return message

    feeder.spoil_joints = beat
    feeder.start()
    try:
        moving(feeder)
        alive[0] = False
        reported(feeder, 'output closed: emergency_stop: nothing within 0.5 s')
        held(feeder)
        feeder.silent()
        assert not feeder.clear_stop().success
        alive[0] = True
        feeder.silent()
        assert feeder.clear_stop().success
        moving(feeder)
        assert witness.assert_safe() >= 4
    finally:
        feeder.stop()
        assert process.stop() == 0


def test_simulated_time_that_pauses_and_jumps_starts_new_episodes(
    test_node: Node, small_bundle: Path
) -> None:
    process, feeder, witness = own_node(
        test_node, small_bundle, '/clock', use_sim_time='true', reliable_sensors='true'
    )

    def play(start_s: float) -> list[dict[str, Any]]:
        """Simulated time from there, twice as slow as real time, until it has two ticks.

        Only ticks of this time count: what was on its way from before it may come late.
        """

        def ticks() -> list[dict[str, Any]]:
            return [
                t for t in feeder.ticks if start_s * 1e9 <= t['stamp_ns'] < start_s * 1e9 + 4e10
            ]

        for step in range(2000):
            stamp_ns = round(start_s * 1e9) + step * 10_000_000
            feeder.publish_clock(stamp_ns)
            feeder.publish(stamp_ns, picture=step % 5 == 0)
            time.sleep(0.02)
            if len(ticks()) >= 2:
                return ticks()
        pytest.fail(f'no ticks\n{process.output}')

    try:
        for start_s, reset in ((100.0, 'activate'), (200.0, 'gap'), (50.0, 'backward')):
            feeder.forget()
            assert reset in str(play(start_s)[0]['reset'])
            wait_until(lambda: feeder.commands, 3, f'commands\n{process.output}')
            # A pause: nothing moves, so nothing is due.
            feeder.silent()
        assert witness.assert_safe() >= 3
    finally:
        assert process.stop() == 0
