# SPDX-License-Identifier: Apache-2.0
"""Times and trajectories as messages keep every nanosecond, name and point."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')

from output_bench import JOINTS, PERIOD, RAMP, T0

from tts_policy.control.conversions import time_to_ns
from tts_policy.control.trajectory import hold_trajectory, plan_trajectory
from tts_policy.node.messages import ns_to_duration, ns_to_time, trajectory_message


@pytest.mark.parametrize('stamp_ns', [0, 1, 999_999_999, 1_000_000_000, 1_700_000_000_123_456_789])
def test_time_survives_the_round_trip_to_the_nanosecond(stamp_ns: int) -> None:
    assert time_to_ns(ns_to_time(stamp_ns)) == stamp_ns
    assert time_to_ns(ns_to_duration(stamp_ns)) == stamp_ns


def test_a_trajectory_carries_stamp_names_and_points() -> None:
    message = trajectory_message(plan_trajectory(RAMP, JOINTS, PERIOD, 1, T0, T0 + PERIOD))
    assert time_to_ns(message.header.stamp) == T0
    assert message.joint_names == list(JOINTS)
    assert len(message.points) == 14
    assert message.points[0].positions.tolist() == RAMP[1].tolist()
    times = [time_to_ns(point.time_from_start) for point in message.points]
    assert times == [PERIOD * (a + 1) for a in range(1, 15)]
    assert message.points[-1].velocities.tolist() == [0.0] * 3


def test_a_hold_has_no_stamp_so_that_it_cannot_expire_on_the_way() -> None:
    message = trajectory_message(hold_trajectory(JOINTS, np.array([0.1, 0.2, 0.0]), PERIOD))
    (point,) = message.points
    assert time_to_ns(message.header.stamp) == 0
    assert point.positions.tolist() == [0.1, 0.2, 0.0]
    assert point.velocities.tolist() == [0.0] * 3
    assert time_to_ns(point.time_from_start) == PERIOD
