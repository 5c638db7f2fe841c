# SPDX-License-Identifier: Apache-2.0
"""Where trajectories go: a topic, an action, and a gripper on a topic of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from rclpy.duration import Duration
from std_msgs.msg import Float64MultiArray

from tts_policy.ros.trajectory import Trajectory, trajectory_message

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rclpy.publisher import Publisher

# Long enough for a local controller to acknowledge, short enough not to delay a shutdown.
_ACK_TIMEOUT_S = 0.2


class TrajectorySink(Protocol):
    """Takes trajectories on their way to a controller."""

    def send(self, trajectory: Trajectory) -> None:
        """Let it replace the one before."""

    def finish(self, trajectory: Trajectory) -> None:
        """Send the last one: wait until it was taken, and send nothing after it."""


class TopicSink:
    """A trajectory_msgs/JointTrajectory topic, as the joint trajectory controller listens to."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    def send(self, trajectory: Trajectory) -> None:
        """Publish it."""
        self._publisher.publish(trajectory_message(trajectory))

    def finish(self, trajectory: Trajectory) -> None:
        """Publish it and wait for the controller's acknowledgement."""
        self.send(trajectory)
        self._publisher.wait_for_all_acked(Duration(seconds=_ACK_TIMEOUT_S))


class ActionSink:
    """A control_msgs/FollowJointTrajectory action; a new goal replaces the one before.

    `refused` hears of a goal that the controller does not take.
    """

    def __init__(self, client: Any, goal_type: Any, refused: Callable[[str], None]) -> None:
        self._client = client
        self._goal_type = goal_type
        self._refused = refused

    def send(self, trajectory: Trajectory) -> None:
        """Send a goal without waiting for its acceptance."""
        if not self._client.server_is_ready():
            self._refused('follow_joint_trajectory: expected an action server, got none')
            return
        goal = self._goal_type(trajectory=trajectory_message(trajectory))
        self._client.send_goal_async(goal).add_done_callback(self._on_answer)

    def finish(self, trajectory: Trajectory) -> None:
        """Send the last goal."""
        self.send(trajectory)

    def _on_answer(self, future: Any) -> None:
        try:
            accepted = future.result().accepted
        except Exception as error:  # noqa: BLE001 - whatever the middleware says, it was not taken
            self._refused(f'follow_joint_trajectory: expected an answer to the goal, got {error}')
            return
        if not accepted:
            self._refused('follow_joint_trajectory: expected the goal to be accepted, it was not')


class GripperStream:
    """Set-points of a gripper's joints as numbers, sent whenever `stream` is called."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._trajectory: Trajectory | None = None

    def send(self, trajectory: Trajectory) -> None:
        """Stream it from now on."""
        self._trajectory = trajectory

    def finish(self, trajectory: Trajectory) -> None:
        """Send the last set-point and stream no more."""
        self._trajectory = None
        self._publish(trajectory.positions[-1])

    def stream(self, now_ns: int) -> None:
        """Send the set-point of this moment, if there is one."""
        trajectory = self._trajectory
        if trajectory is not None:
            self._publish(trajectory.positions_at(np.array([now_ns]))[0])

    def _publish(self, positions: np.ndarray) -> None:
        self._publisher.publish(Float64MultiArray(data=positions.tolist()))


class SplitSink:
    """The arm's joints to one sink, the gripper's to another or, None, to nobody."""

    def __init__(
        self,
        arm: TrajectorySink,
        gripper: TrajectorySink | None,
        joints: Sequence[str],
        gripper_joints: Sequence[str],
    ) -> None:
        self._arm, self._gripper = arm, gripper
        self._arm_joints = [joint for joint in joints if joint not in gripper_joints]
        self._gripper_joints = list(gripper_joints)

    def send(self, trajectory: Trajectory) -> None:
        """Send each its joints."""
        self._arm.send(trajectory.of(self._arm_joints))
        if self._gripper is not None:
            self._gripper.send(trajectory.of(self._gripper_joints))

    def finish(self, trajectory: Trajectory) -> None:
        """Send each its joints for the last time."""
        if self._gripper is not None:
            self._gripper.finish(trajectory.of(self._gripper_joints))
        self._arm.finish(trajectory.of(self._arm_joints))
