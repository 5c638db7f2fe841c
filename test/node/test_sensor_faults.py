# SPDX-License-Identifier: Apache-2.0
"""Faults of cameras and joint states: what the node commands, reports, and how it recovers.

Every test starts from an arm in motion, and ends with an arm in motion again. A witness judges
each command that left the node, whatever else the test looks at. One node survives them all.
"""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')
pytest.importorskip('torch', reason='torch is not installed')

from cell import held, moving, reported
from feeder import HEIGHT, JOINT_PERIOD_S, Feeder
from processes import wait_until
from spoilers import cut, delay, every, freeze, set_field, shift_stamp, shrink, swap, without_elbow

from tts_policy.control.conversions import time_to_ns
from tts_policy.node.messages import ns_to_time

if TYPE_CHECKING:
    from collections.abc import Callable

    from sensor_msgs.msg import Image, JointState

pytestmark = pytest.mark.fault

NAMESPACE = '/sensor_faults'


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
        (cut, 'camera/image: expected 2304 bytes (height 24 x step'),
        (set_field(step=32), 'camera/image: expected step of at least 96 bytes'),
    ],
    ids=['stops', 'freezes', 'ahead', 'behind', 'late', 'size', '16 bit', 'truncated', 'step'],
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
        (set_field(position=[0.1, 9.0, np.nan, 0.3]), "at most 1e+06, got {'elbow': nan"),
        (set_field(position=[0.1, 9.0, 1e39, 0.3]), "at most 1e+06, got {'elbow': 1e+39"),
        (set_field(position=[0.1, 9.0, 0.3]), 'got 4 names and 3 positions'),
        (set_field(name=['finger', 'elbow', 'elbow', 'shoulder']), 'expected each joint once'),
        (set_field(name=['finger', 'spare', 'Elbow', 'shoulder']), "missing ['elbow']"),
        (shift_stamp(-10), 'joints: nothing for 10'),
        (shift_stamp(60), 'joint_states: message is future'),
    ],
    ids=[
        'stop',
        'missing one',
        'NaN',
        '1e39',
        'too short',
        'repeated',
        'other name',
        'behind',
        'ahead',
    ],
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


@pytest.mark.parametrize(
    'foreign',
    [
        set_field(name=['left_pad', 'right_pad'], position=[0.0, 0.0]),
        set_field(position=[], velocity=[0.0, 0.0, 0.0, 0.0]),
    ],
    ids=['other joints', 'velocities alone'],
)
def test_joint_states_of_another_device_on_the_topic_are_no_fault(
    arm: Feeder, foreign: Callable[[JointState], Any]
) -> None:
    arm.spoil_joints = lambda message: [foreign(copy.deepcopy(message)), message]
    time.sleep(1.5)
    moving(arm)
    assert not any(tick['reset'] for tick in arm.ticks)
    arm.forget()
    wait_until(lambda: arm.status is not None, 4, 'a report')
    assert arm.status.level == b'\x00', arm.status.message


def test_joints_too_far_from_the_frame_are_not_used(arm: Feeder) -> None:
    arm.spoil_joints = every(12)
    reported(arm, 'joints: expected a sample within')
    arm.commands.clear()


def test_a_robot_whose_clock_is_a_little_ahead_is_told_and_gets_no_points_that_are_past(
    arm: Feeder,
) -> None:
    def ahead(message: Any) -> Any:
        message.header.stamp = ns_to_time(time_to_ns(message.header.stamp) + 80_000_000)
        return message

    arm.spoil_image = arm.spoil_joints = ahead
    reported(arm, 'clock: expected stamps of sensors that are not ahead, got 0.0')
    moving(arm)
    assert all(tick['observation_age_s'] >= 0.0 for tick in arm.ticks)


def test_a_driver_that_repeats_its_last_state_while_the_arm_moves_is_found_out(
    arm: Feeder,
) -> None:
    arm.inject('sweep')
    reported(arm, 'joint_states: expected motion as commanded, got the same positions for 0.')
    held(arm)
    arm.silent()
    # A state that differs by the noise of an encoder is a live one.
    arm.inject('')
    arm.spoil_joints = set_field(position=[0.1, 9.0, 0.2, 0.3 + 1e-6])
    moving(arm)


def test_publishers_at_ten_times_their_rate_do_no_harm(arm: Feeder) -> None:
    arm.period_s = JOINT_PERIOD_S / 10
    time.sleep(1.0)
    moving(arm)
