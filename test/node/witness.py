# SPDX-License-Identifier: Apache-2.0
"""Judges every command that a policy node publishes; it uses none of the code of the node."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING

import numpy as np
from rclpy.qos import QoSProfile, ReliabilityPolicy
from std_msgs.msg import String
from trajectory_msgs.msg import JointTrajectory

if TYPE_CHECKING:
    from rclpy.node import Node

QOS = QoSProfile(depth=1000, reliability=ReliabilityPolicy.RELIABLE)
JOINTS = ['shoulder', 'elbow', 'finger']
MEASURED = np.array([0.3, 0.2, 0.1])
LOWER, UPPER = np.array([-0.9, -0.9, 0.0]), np.array([0.9, 0.9, 0.5])
VELOCITY, ACCELERATION, FIRST_POINT = 1.0, 10.0, 0.2
TOLERANCE = 0.02
PERIOD_S = 0.05


def _seconds(time: object) -> float:
    return time.sec + time.nanosec * 1e-9  # type: ignore[attr-defined]


class Witness:
    """Collects the commands of one namespace; `assert_safe` judges those since the last time."""

    def __init__(self, node: Node, namespace: str) -> None:
        self._lock = threading.Lock()
        self._commands: list[JointTrajectory] = []
        self._ages_s: dict[float, float] = {}
        self._last: JointTrajectory | None = None
        self._subscriptions = [
            node.create_subscription(
                JointTrajectory, f'{namespace}/joint_trajectory', self._on_command, QOS
            ),
            node.create_subscription(
                String, f'{namespace}/tts_policy/chunk_stats', self._on_tick, QOS
            ),
        ]

    def _on_command(self, message: JointTrajectory) -> None:
        with self._lock:
            self._commands.append(message)

    def _on_tick(self, message: String) -> None:
        tick = json.loads(message.data)
        with self._lock:
            self._ages_s[tick['stamp_ns']] = tick['observation_age_s']

    def assert_safe(self) -> int:
        """Check every command; returns how many there were."""
        with self._lock:
            commands, self._commands = self._commands, []
            ages_s = dict(self._ages_s)
        for command in commands:
            self._check(command)
            stamp_ns = command.header.stamp.sec * 10**9 + command.header.stamp.nanosec
            if stamp_ns in ages_s:
                # No point was in the past when it was published.
                assert _seconds(command.points[0].time_from_start) > ages_s[stamp_ns]
            self._check_takeover(command)
            self._last = command
        return len(commands)

    @staticmethod
    def _check(command: JointTrajectory) -> None:
        assert list(command.joint_names) == JOINTS
        positions = np.array([point.positions for point in command.points])
        times = np.array([_seconds(point.time_from_start) for point in command.points])
        assert np.isfinite(positions).all()
        assert (positions >= LOWER).all() and (positions <= UPPER).all()
        assert times[0] > 0.0 and (np.diff(times) > 0.0).all()
        assert np.abs(positions[0] - MEASURED).max() <= FIRST_POINT + 1e-9
        rates = np.diff(positions, axis=0) / np.diff(times)[:, None]
        assert (np.abs(rates) <= VELOCITY * (1 + TOLERANCE) + 1e-9).all()
        accelerations = np.diff(rates, axis=0) / PERIOD_S
        assert (np.abs(accelerations) <= ACCELERATION * (1 + TOLERANCE) + 1e-6).all()
        velocities = np.array([point.velocities for point in command.points])
        assert (np.abs(velocities) <= VELOCITY + 1e-9).all()
        assert (velocities[-1] == 0.0).all()

    def _check_takeover(self, command: JointTrajectory) -> None:
        """Check that what is in force and the first point are no jump apart."""
        last = self._last
        if last is None or len(last.points) == 1 or len(command.points) == 1:
            return
        start = _seconds(last.header.stamp)
        times = [start + _seconds(point.time_from_start) for point in last.points]
        if _seconds(command.header.stamp) > times[-1]:
            return  # the arm was at rest
        first = command.points[0]
        due = _seconds(command.header.stamp) + _seconds(first.time_from_start)
        if due < start:
            return  # the clock was set back
        before = np.array([p.positions for p in last.points])
        in_force = np.array([np.interp(due - PERIOD_S, times, column) for column in before.T])
        bound = VELOCITY * (1 + TOLERANCE) * PERIOD_S + 1e-6
        assert np.abs(np.array(first.positions) - in_force).max() <= bound
