# SPDX-License-Identifier: Apache-2.0
"""Faults of a robot while its policy runs: what the node commands, reports, and how it recovers.

Every test starts from an arm in motion, and ends with an arm in motion again. A witness judges
each command that left the node, whatever else the test looks at.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')
pytest.importorskip('torch', reason='torch is not installed')

from feeder import HEIGHT, JOINT_PERIOD_S, Feeder
from processes import RosProcess, wait_until
from sensor_msgs.msg import Image, JointState
from witness import ACCELERATION, FIRST_POINT, LOWER, TOLERANCE, UPPER, VELOCITY, Witness

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rclpy.node import Node

pytestmark = pytest.mark.fault

NAMESPACE = '/cell'
FOLDER = str(Path(__file__).parent)
PARAMETERS: dict[str, Any] = {
    'enable_output': 'true',
    'n_execute': 4,
    'max_skew_s': 0.02,
    'gap_limit_s': 2.0,
    'inference_timeout_s': 1.2,
    'min_points': 3,
    'limits.joints': '[shoulder, elbow, finger]',
    'limits.lower': LOWER.tolist(),
    'limits.upper': UPPER.tolist(),
    'limits.velocity': [VELOCITY] * 3,
    'limits.acceleration': [ACCELERATION] * 3,
    'limits.first_point': [FIRST_POINT] * 3,
    'limits.tolerance': TOLERANCE,
}


def start_node(small_bundle: Path, namespace: str = NAMESPACE, **more: Any) -> RosProcess:
    """Start the node whose policy can be spoiled; it configures and activates itself."""
    arguments = ['--ros-args', '-r', f'__ns:={namespace}']
    values = {**PARAMETERS, 'bundle': small_bundle, 'autostart': 'true', **more}
    for name, value in values.items():
        arguments += ['-p', f'{name}:={value}']
    return RosProcess('faulty_node', *arguments, PYTHONPATH=FOLDER)


@pytest.fixture(scope='module')
def process(small_bundle: Path) -> Iterator[RosProcess]:
    """One node for most faults: that it survives them all is part of the test."""
    process = start_node(small_bundle)
    yield process
    assert process.stop() == 0, process.output


@pytest.fixture(scope='module')
def witness(test_node: Node) -> Witness:
    return Witness(test_node, NAMESPACE)


@pytest.fixture(scope='module')
def module_feeder(test_node: Node, witness: Witness, process: RosProcess) -> Iterator[Feeder]:
    feeder = Feeder(test_node, NAMESPACE)
    wait_until(lambda: feeder.matched, 20, f'subscriptions\n{process.output}')
    feeder.start()
    yield feeder
    feeder.stop()


def moving(feeder: Feeder, output: str = '') -> None:
    """Wait until new commands come."""
    feeder.forget()
    wait_until(lambda: len(feeder.commands) >= 2, 4, f'an arm in motion\n{output}')


@pytest.fixture
def arm(module_feeder: Feeder, process: RosProcess, witness: Witness) -> Iterator[Feeder]:
    """Give an arm in motion; afterwards take the fault away and see that it moves again."""
    feeder = module_feeder
    moving(feeder, process.output[-3000:])
    wait_until(lambda: feeder.status and feeder.status.level == b'\x00', 4, 'an OK in diagnostics')
    feeder.forget()
    yield feeder
    feeder.period_s = JOINT_PERIOD_S
    feeder.spoil_image = feeder.spoil_joints = lambda message: message
    feeder.inject('')
    if feeder.state() == 'inactive':
        # What deactivates the node needs somebody to look at it.
        assert feeder.change('cleanup')
        assert feeder.change('configure')
        wait_until(lambda: feeder.matched, 5, 'subscriptions')
        assert feeder.change('activate')
    moving(feeder, process.output[-3000:])
    assert witness.assert_safe() >= 2


def reported(feeder: Feeder, reason: str) -> None:
    """Wait for diagnostics above OK that contain the reason."""

    def found() -> bool:
        status = feeder.status
        return status is not None and status.level != b'\x00' and reason in status.message

    try:
        wait_until(found, 4, f'diagnostics with {reason!r}')
    except pytest.fail.Exception as error:
        raise AssertionError(f'{error}; last was {feeder.status}') from error


def held(feeder: Feeder) -> None:
    """Wait until the last command is a hold point: one point."""
    wait_until(lambda: feeder.commands and len(feeder.commands[-1].points) == 1, 2, 'hold')


def set_field(**fields: Any) -> Callable[[Any], Any]:
    """Return a spoiler that sets fields of a message."""

    def spoil(message: Any) -> Any:
        for name, value in fields.items():
            setattr(message, name, value)
        return message

    return spoil


def shift_stamp(seconds: int) -> Callable[[Any], Any]:
    """Return a spoiler of the clock of a sensor."""

    def spoil(message: Any) -> Any:
        message.header.stamp.sec += seconds
        return message

    return spoil


def delay(messages: int) -> Callable[[Any], Any]:
    """Return a spoiler that holds messages back for so many more."""
    queue: deque[Any] = deque()

    def spoil(message: Any) -> Any:
        queue.append(message)
        return queue.popleft() if len(queue) > messages else None

    return spoil


def freeze() -> Callable[[Any], Any]:
    """Return a spoiler that repeats the first message for ever."""
    first: list[Any] = []

    def spoil(message: Any) -> Any:
        first.append(message)
        return first[0]

    return spoil


def swap() -> Callable[[Any], Any]:
    """Return a spoiler that publishes two messages at a time, the newer one first."""
    held: list[Any] = []

    def spoil(message: Any) -> Any:
        held.append(message)
        if len(held) < 2:
            return None
        newer_first = held[::-1]
        held.clear()
        return newer_first

    return spoil


def every(count: int) -> Callable[[Any], Any]:
    """Return a spoiler that lets one of so many messages through."""
    seen = 0

    def spoil(message: Any) -> Any:
        nonlocal seen
        seen += 1
        return message if seen % count == 0 else None

    return spoil


def shrink(message: Image) -> Image:
    message.height, message.data = HEIGHT // 2, message.data[: HEIGHT // 2 * message.step]
    return message


def cut(message: Image) -> Image:
    message.data = message.data[:-1]
    return message


def without_elbow(message: JointState) -> JointState:
    message.name, message.position = ['finger', 'shoulder'], [0.1, 0.3]
    return message


# Sensors


@pytest.mark.parametrize(
    ('spoil', 'reason'),
    [
        (lambda message: None, 'camera: nothing for'),
        (freeze(), 'camera: nothing for'),
        (shift_stamp(3600), 'camera/image: message is future'),
        (shift_stamp(-10), 'camera: nothing for 10'),
        (delay(8), 'camera: nothing for'),
        (shrink, f'camera/image: expected an image of {HEIGHT} x 32'),
        (set_field(encoding='16UC1'), 'camera/image: expected encoding rgb8, bgr8, rgba8, bgra8'),
        (cut, 'camera/image: expected 2304 bytes'),
    ],
    ids=['stops', 'freezes', 'ahead', 'behind', 'late', 'size', '16 bit', 'truncated'],
)
def test_a_bad_camera_stops_the_arm_and_is_named(
    arm: Feeder, spoil: Callable[[Image], Any], reason: str
) -> None:
    arm.spoil_image = spoil
    reported(arm, reason)
    arm.silent()


@pytest.mark.parametrize(
    ('spoil', 'reason'),
    [
        (lambda message: None, 'joints: nothing for'),
        (without_elbow, "missing ['elbow']"),
        (set_field(position=[0.1, 9.0, np.nan, 0.3]), "expected finite positions, got {'elbow'"),
        (set_field(position=[0.1, 9.0, 0.3]), 'got 4 names and 3 positions'),
        (set_field(name=['finger', 'elbow', 'elbow', 'shoulder']), 'expected each joint once'),
        (shift_stamp(-10), 'joints: nothing for 10'),
        (shift_stamp(60), 'joint_states: message is future'),
    ],
    ids=['stop', 'missing one', 'NaN', 'too short', 'repeated', 'behind', 'ahead'],
)
def test_bad_joint_states_stop_the_arm_and_are_named(
    arm: Feeder, spoil: Callable[[JointState], Any], reason: str
) -> None:
    arm.spoil_joints = spoil
    reported(arm, reason)
    arm.silent()


@pytest.mark.parametrize(
    ('image', 'joints'),
    [
        (swap(), lambda message: message),
        (lambda message: [message, message], lambda message: [message, message]),
        (
            lambda message: message,
            set_field(
                name=['elbow', 'shoulder', 'finger', 'spare'], position=[0.2, 0.3, 0.1, 7.0]
            ),
        ),
        (lambda message: message, swap()),
    ],
    ids=['frames swapped', 'all twice', 'joints in another order', 'states swapped'],
)
def test_what_can_be_put_right_does_not_stop_the_arm(
    arm: Feeder, image: Callable[[Any], Any], joints: Callable[[Any], Any]
) -> None:
    arm.spoil_image, arm.spoil_joints = image, joints
    time.sleep(0.3)
    moving(arm)
    assert not any(tick['reset'] for tick in arm.ticks)


def test_joints_too_far_from_the_frame_are_not_used(arm: Feeder) -> None:
    arm.spoil_joints = every(12)
    reported(arm, 'joints: expected a sample within')
    arm.commands.clear()


def test_publishers_at_ten_times_their_rate_do_no_harm(arm: Feeder) -> None:
    arm.period_s = JOINT_PERIOD_S / 10
    time.sleep(1.0)
    moving(arm)


# Inference


def test_a_short_stall_drops_points_and_goes_on(arm: Feeder) -> None:
    arm.inject('stall 0.2')
    late = wait_until(
        lambda: [t for t in arm.ticks if t['observation_age_s'] > 0.2 and not t['refused']],
        3,
        'a late chunk',
    )
    assert late[0]['dropped_points'] >= 4


def test_a_chunk_that_comes_too_late_is_not_sent_and_is_a_missed_deadline(arm: Feeder) -> None:
    arm.inject('stall 0.8')
    refused = wait_until(
        lambda: [tick['refused'] for tick in arm.ticks if tick['refused']], 3, 'a refused chunk'
    )
    assert 'set-points or more still to come' in refused[0]
    reported(arm, 'deadline missed')


def test_a_policy_that_is_always_late_drops_points_and_says_so(arm: Feeder) -> None:
    arm.inject('slow 0.25')
    reported(arm, 'deadline missed')
    moving(arm)
    wait_until(lambda: any(t['dropped_points'] >= 5 for t in arm.ticks), 3, 'dropped points')


@pytest.mark.parametrize('fault', ['stall 2.0', 'hang'])
def test_a_hung_inference_deactivates_the_node_with_a_hold(arm: Feeder, fault: str) -> None:
    arm.inject(fault)
    reported(arm, 'inference failed: a tick has taken')
    assert arm.state() == 'inactive'
    held(arm)
    arm.silent()
    if fault == 'hang':
        assert not arm.change('activate')


def test_a_policy_that_raises_deactivates_the_node_with_a_hold(arm: Feeder) -> None:
    arm.inject('raise')
    reported(arm, 'inference failed: RuntimeError: out of memory')
    assert arm.state() == 'inactive'
    held(arm)
    arm.silent()


@pytest.mark.parametrize(
    ('fault', 'reason'),
    [
        ('nan', 'expected finite set-points, got nan'),
        ('inf', 'expected finite set-points, got inf'),
        ('outside', 'shoulder: expected position [-0.9, 0.9]'),
        ('fast', 'elbow: expected velocity at most 1.0'),
        ('zigzag', 'expected acceleration at most 10.0'),
        ('jump', 'shoulder: expected'),
        ('columns', 'chunk: expected [usable, 3] set-points'),
        ('empty', 'chunk: expected [usable, 3] set-points'),
    ],
)
def test_a_bad_chunk_is_dropped_whole_and_counted(arm: Feeder, fault: str, reason: str) -> None:
    arm.inject(fault)
    reported(arm, reason)
    arm.silent()
    assert int(arm.values()['refused_chunks']) > 0


# Operators


def test_a_storm_of_parameters_neither_stops_the_arm_nor_tears_a_tick(arm: Feeder) -> None:
    arm.forget()
    pairs = [{'sparsity': 0.3 + 0.5 * (n % 2), 'n_execute': 3 + n % 2} for n in range(1000)]
    assert arm.set_all(pairs) == 1000
    assert {tick['requested_sparsity'] for tick in arm.ticks} <= {0.3, 0.8}
    moving(arm)
    assert arm.set(sparsity=0.8, n_execute=4) == ''


def test_a_gate_that_is_switched_quickly_holds_each_time(arm: Feeder) -> None:
    for _ in range(5):
        assert arm.set(enable_output=False) == ''
        held(arm)
        count = len(arm.commands)
        assert arm.set(enable_output=True) == ''
        wait_until(lambda n=count: len(arm.commands) > n, 3, 'commands')


def test_an_emergency_stop_closes_the_gate_until_the_service(arm: Feeder) -> None:
    arm.emergency_stop(True)
    held(arm)
    arm.silent()
    reported(arm, 'output closed: emergency stop')
    assert arm.set(enable_output=False) == arm.set(enable_output=True) == ''
    refused = arm.clear_stop()
    assert not refused.success and 'still true' in refused.message
    arm.emergency_stop(False)
    arm.silent()
    wait_until(lambda: arm.proposals, 3, 'a dry run meanwhile')
    assert arm.clear_stop().success


def test_a_stop_outlasts_deactivate_and_cleanup(arm: Feeder) -> None:
    arm.emergency_stop(True)
    held(arm)
    for transition in ('deactivate', 'cleanup', 'configure'):
        assert arm.change(transition)
    wait_until(lambda: arm.matched, 5, 'subscriptions')
    assert arm.change('activate')
    arm.silent()
    arm.emergency_stop(False)
    wait_until(lambda: arm.clear_stop().success, 2, 'an opened gate')


def test_a_transition_that_is_not_possible_does_not_end_the_node(arm: Feeder) -> None:
    arm.ask('cleanup')
    arm.ask('configure')
    moving(arm)
    assert arm.state() == 'active'


def test_a_reset_in_motion_is_one_dense_tick(arm: Feeder) -> None:
    assert arm.reset().success
    wait_until(lambda: any(tick['reset'] == 'service' for tick in arm.ticks), 2, 'reset')
    moving(arm)


# Robot description

TIGHT = """<robot name="r"><joint name="shoulder" type="revolute">
<limit lower="-2" upper="2" velocity="0.01" effort="1"/></joint></robot>"""
WIDE = TIGHT.replace('0.01', '3')


def test_a_robot_description_with_entities_stops_the_arm_until_a_sound_one_comes(
    arm: Feeder,
) -> None:
    arm.describe_robot(f'<!DOCTYPE robot [<!ENTITY a "b">]>{WIDE}')
    reported(arm, 'expected no document type declaration')
    arm.silent()
    arm.describe_robot(WIDE)


def test_a_robot_description_tightens_the_limits(arm: Feeder) -> None:
    arm.describe_robot(TIGHT)
    reported(arm, 'shoulder: expected velocity at most 0.01')
    arm.silent()
    arm.describe_robot(WIDE)


# Processes and clocks


def test_a_node_that_stood_still_sends_nothing_late(arm: Feeder, process: RosProcess) -> None:
    for pause_s in (0.3, 1.0):
        process.send(signal.SIGSTOP)
        time.sleep(pause_s)
        process.send(signal.SIGCONT)
        moving(arm)


def own_node(
    test_node: Node, small_bundle: Path, namespace: str, **more: Any
) -> tuple[RosProcess, Feeder, Witness]:
    """Start a node for one test alone."""
    witness = Witness(test_node, namespace)
    feeder = Feeder(test_node, namespace)
    process = start_node(small_bundle, namespace, **more)
    wait_until(lambda: feeder.matched, 20, f'subscriptions\n{process.output}')
    return process, feeder, witness


def test_a_robot_that_is_killed_and_comes_back_is_waited_for(
    test_node: Node, small_bundle: Path
) -> None:
    namespace = '/killed_robot'
    process, feeder, witness = own_node(test_node, small_bundle, namespace)
    robots = [RosProcess('feeder', namespace, PYTHONPATH=FOLDER)]
    try:
        moving(feeder)
        robots[0].send(signal.SIGKILL)
        robots[0].wait(5.0)
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
        process.wait(20.0)
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
