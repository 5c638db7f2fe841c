# SPDX-License-Identifier: Apache-2.0
"""Where trajectories go: a topic, an action, and a gripper on a topic of its own."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from action_msgs.msg import GoalStatus
from rclpy.duration import Duration
from std_msgs.msg import Float64MultiArray

from tts_policy.control.trajectory import NotReady, Trajectory, TrajectoryRefused
from tts_policy.node.messages import trajectory_message

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rclpy.publisher import Publisher

    from tts_policy.control.output import TrajectorySink

# Long enough for a local controller to acknowledge, short enough not to delay a shutdown.
_ACK_TIMEOUT_S = 0.2
GOAL_ENDS = {GoalStatus.STATUS_ABORTED: 'aborted', GoalStatus.STATUS_CANCELED: 'canceled'}


class TopicSink:
    """A trajectory_msgs/JointTrajectory topic, as the joint trajectory controller listens to."""

    following = True

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    def send(self, trajectory: Trajectory) -> None:
        """Publish it."""
        self._publisher.publish(trajectory_message(trajectory))

    def finish(self, trajectory: Trajectory) -> None:
        """Publish it."""
        self.send(trajectory)

    def settle(self) -> None:
        """Wait for the controller's acknowledgement."""
        self._publisher.wait_for_all_acked(Duration(seconds=_ACK_TIMEOUT_S))


class ActionSink:
    """A control_msgs/FollowJointTrajectory action; a new goal replaces the one before.

    `refused` hears of a goal that the controller does not take, or ends while it is the newest,
    and of a last one that nobody was there for. Where the last one is not taken, the goal that was
    is cancelled: what the controller does without a goal is to hold.
    """

    def __init__(self, client: Any, goal_type: Any, refused: Callable[[str], None]) -> None:
        self._client = client
        self._goal_type = goal_type
        self._refused = refused
        self._sent = 0
        self._lost = 0
        self._accepted: Any = None

    @property
    def following(self) -> bool:
        """Whether the newest goal was neither refused nor ended early, as far as is known."""
        return self._lost != self._sent or self._sent == 0

    def send(self, trajectory: Trajectory) -> None:
        """Send a goal without waiting for its acceptance.

        Raises
        ------
        NotReady
            without a server: the arm will not follow, so nothing may build on it.

        """
        self._send(trajectory, last=False)

    def finish(self, trajectory: Trajectory) -> None:
        """Send the last goal."""
        try:
            self._send(trajectory, last=True)
        except TrajectoryRefused as error:
            self._refused(str(error))

    def settle(self) -> None:
        """Do not wait: the answer comes to the executor, which is where this is called."""

    def _send(self, trajectory: Trajectory, last: bool) -> None:
        if not self._client.server_is_ready():
            raise NotReady('follow_joint_trajectory: expected an action server, got none')
        self._sent += 1
        goal = self._goal_type(trajectory=trajectory_message(trajectory))
        answer = self._client.send_goal_async(goal)
        answer.add_done_callback(partial(self._on_answer, self._sent, last))

    def _on_answer(self, number: int, last: bool, future: Any) -> None:
        try:
            handle = future.result()
        except Exception as error:  # noqa: BLE001 - whatever the middleware says, it was not taken
            self._not_taken(number, last, f'expected an answer to the goal, got {error}')
            return
        if not handle.accepted:
            self._not_taken(number, last, 'expected the goal to be accepted, it was not')
            return
        self._accepted = handle
        handle.get_result_async().add_done_callback(partial(self._on_result, number))

    def _not_taken(self, number: int, last: bool, why: str) -> None:
        self._lost = max(self._lost, number)
        self._refused(f'follow_joint_trajectory: {why}')
        if last and number == self._sent and self._accepted is not None:
            self._accepted.cancel_goal_async()

    def _on_result(self, number: int, future: Any) -> None:
        # A controller ends the goal that a newer one replaces: that is how it goes on.
        if number != self._sent or future.cancelled() or future.exception() is not None:
            return
        answer = future.result()
        end = GOAL_ENDS.get(answer.status)
        if end is not None:
            self._lost = number
            why = answer.result.error_string or f'error code {answer.result.error_code}'
            self._refused(f'follow_joint_trajectory: the goal was {end}: {why}')


class GripperStream:
    """Set-points of a gripper's joints as numbers, sent whenever `stream` is called.

    Until the first point is due they lead there from where the trajectory sets out.
    """

    following = True

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._lock = threading.Lock()
        self._trajectory: Trajectory | None = None

    def send(self, trajectory: Trajectory) -> None:
        """Stream it from now on."""
        self._trajectory = trajectory

    def finish(self, trajectory: Trajectory) -> None:
        """Stay at the set-point in force and stream no more."""
        origin = trajectory.origin
        with self._lock:
            self._trajectory = None
            self._publish(trajectory.positions[-1] if origin is None else origin.setpoints)

    def settle(self) -> None:
        """Do not wait: a gripper that misses a number keeps the one before."""

    def stream(self, now_ns: int) -> None:
        """Send the set-point of this moment, if there is one; never waits for `finish`."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self._trajectory is not None:
                self._publish(self._trajectory.position_at(now_ns))
        finally:
            self._lock.release()

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

    @property
    def following(self) -> bool:
        """Whether the arm follows: a gripper says nothing."""
        return self._arm.following

    def send(self, trajectory: Trajectory) -> None:
        """Send each its joints."""
        self._arm.send(trajectory.of(self._arm_joints))
        if self._gripper is not None:
            self._gripper.send(trajectory.of(self._gripper_joints))

    def finish(self, trajectory: Trajectory) -> None:
        """Send each its joints for the last time, the arm first: it may hurt somebody."""
        self._arm.finish(trajectory.of(self._arm_joints))
        if self._gripper is not None:
            self._gripper.finish(trajectory.of(self._gripper_joints))

    def settle(self) -> None:
        """Wait for both."""
        self._arm.settle()
        if self._gripper is not None:
            self._gripper.settle()
