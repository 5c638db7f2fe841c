# SPDX-License-Identifier: Apache-2.0
"""The only way from a chunk to the robot: timing, limits, the output gate and the hold point.

A command is sent only with the gate open. When the gate closes after a command, one hold-position
point follows. Calls come from the inference thread and from the executor; the owner serialises
them with `InferenceWorker.exclusive`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rclpy.duration import Duration

from tts_policy.ros.conversions import seconds_to_ns
from tts_policy.ros.trajectory import (
    JointLimits,
    Trajectory,
    TrajectoryRefused,
    hold_trajectory,
    plan_trajectory,
    trajectory_message,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from rclpy.publisher import Publisher

    from tts_policy.core.contract import PolicyContract

# Long enough for a local controller to acknowledge, short enough not to delay a shutdown.
_HOLD_ACK_TIMEOUT_S = 0.2


@dataclass(frozen=True)
class HoldRule:
    """How to hold: due after `delay_ns`; `last_command` joints (a gripper) keep their set-point.

    A measured state older than `max_age_ns` is no place to go back to: then all joints do.
    """

    delay_ns: int
    last_command: Sequence[str]
    max_age_ns: int


class CommandOutput:
    """Publishes chunks as trajectories, on the command topic or, gate closed, as proposals."""

    def __init__(
        self,
        contract: PolicyContract,
        limits: JointLimits,
        hold_rule: HoldRule,
        command: Publisher,
        proposed: Publisher,
    ) -> None:
        self.joints = contract.action.joints
        self._offset_steps = contract.action.offset_steps
        self._period_ns = seconds_to_ns(contract.observation.period_s)
        self._limits = limits
        self._hold_rule = hold_rule
        self._command = command
        self._proposed = proposed
        self._measured: tuple[int, np.ndarray] | None = None
        self._sent: Trajectory | None = None

    def begin(self) -> None:
        """Forget the measured state and the last command: nothing was commanded yet."""
        self._measured = self._sent = None

    def measured(self, stamp_ns: int, positions: np.ndarray) -> None:
        """Newest measured positions [A] of `joints`."""
        self._measured = (stamp_ns, positions)

    def send(self, actions: np.ndarray, stamp_ns: int, now_ns: int, enabled: bool) -> Trajectory:
        """Publish the points of a chunk that are still to come.

        Raises
        ------
        TrajectoryRefused
            for a chunk that must not reach the robot; nothing is published then.

        """
        trajectory = plan_trajectory(
            actions, self.joints, self._period_ns, self._offset_steps, stamp_ns, now_ns
        )
        if self._measured is None:
            raise TrajectoryRefused('chunk: expected a measured joint state, got none yet')
        trajectory = self._limits.apply(trajectory, self._period_ns, self._measured[1])
        (self._command if enabled else self._proposed).publish(trajectory_message(trajectory))
        if enabled:
            self._sent = trajectory
        return trajectory

    def hold(self, now_ns: int) -> bool:
        """Command the present position once; False when nothing was commanded before."""
        if self._sent is None or self._measured is None:
            return False
        rule = self._hold_rule
        stamp_ns, measured = self._measured
        position = self._sent.position_at(now_ns)
        if now_ns - stamp_ns <= rule.max_age_ns:
            keep = position
            position = measured.copy()
            for at, name in enumerate(self.joints):
                if name in rule.last_command:
                    position[at] = keep[at]
        hold = hold_trajectory(self.joints, position, now_ns, rule.delay_ns)
        self._command.publish(trajectory_message(hold))
        self._command.wait_for_all_acked(Duration(seconds=_HOLD_ACK_TIMEOUT_S))
        self._sent = None
        return True
