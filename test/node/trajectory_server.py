# SPDX-License-Identifier: Apache-2.0
"""A controller behind a FollowJointTrajectory action, as a process of its own.

It follows a goal until its end, until a newer one comes, or until it is cancelled; what it takes
is repeated on `taken`. The parameter `answer` makes it reject or abort.
"""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

import rclpy
from control_msgs.action import FollowJointTrajectory
from rclpy.action import ActionServer, CancelResponse, GoalResponse
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.executors import ExternalShutdownException, MultiThreadedExecutor
from rclpy.node import Node
from trajectory_msgs.msg import JointTrajectory


class TrajectoryServer(Node):
    """Accepts, rejects, or accepts and aborts."""

    def __init__(self, namespace: str) -> None:
        super().__init__('controller', namespace=namespace)
        self.declare_parameter('answer', 'accept')
        self._newest: Any = None
        self._taken = self.create_publisher(JointTrajectory, 'taken', 100)
        self._server = ActionServer(
            self,
            FollowJointTrajectory,
            'follow_joint_trajectory',
            self._follow,
            goal_callback=self._on_goal,
            cancel_callback=lambda goal: CancelResponse.ACCEPT,
            callback_group=ReentrantCallbackGroup(),
        )

    def _on_goal(self, goal: FollowJointTrajectory.Goal) -> GoalResponse:
        if self.get_parameter('answer').value == 'reject':
            return GoalResponse.REJECT
        self._taken.publish(goal.trajectory)
        return GoalResponse.ACCEPT

    def _follow(self, handle: Any) -> FollowJointTrajectory.Result:
        self._newest = handle
        last = handle.request.trajectory.points[-1].time_from_start
        end_s = time.monotonic() + last.sec + last.nanosec * 1e-9
        while time.monotonic() < end_s:
            if handle.is_cancel_requested:
                handle.canceled()
                return FollowJointTrajectory.Result(error_string='somebody cancelled it')
            if self.get_parameter('answer').value == 'abort':
                handle.abort()
                return FollowJointTrajectory.Result(
                    error_code=FollowJointTrajectory.Result.PATH_TOLERANCE_VIOLATED,
                    error_string='elbow is off its path',
                )
            if self._newest is not handle:
                handle.abort()
                return FollowJointTrajectory.Result(error_string='replaced by a newer goal')
            time.sleep(0.01)
        handle.succeed()
        return FollowJointTrajectory.Result()


def main() -> None:
    """Serve until killed."""
    rclpy.init()
    executor = MultiThreadedExecutor(8)
    executor.add_node(TrajectoryServer(sys.argv[1]))
    with contextlib.suppress(KeyboardInterrupt, ExternalShutdownException):
        executor.spin()


if __name__ == '__main__':
    main()
