# SPDX-License-Identifier: Apache-2.0
"""The publishers of a configured node, and the sinks made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tts_policy.node.interface import (
    CHUNK_STATS,
    GRIPPER_COMMANDS,
    GRIPPER_TRAJECTORY,
    JOINT_TRAJECTORY,
    PLAN_IMAGE,
    PROPOSED_TRAJECTORY,
    Endpoint,
)
from tts_policy.node.parameters import ParameterError
from tts_policy.node.sinks import ActionSink, GripperStream, SplitSink, TopicSink

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rclpy.lifecycle import LifecycleNode

    from tts_policy.control.output import TrajectorySink
    from tts_policy.node.parameters import Settings

ACTION = 'follow_joint_trajectory'


class CommandTopics:
    """Everything a configured node publishes, made by its parameters."""

    def __init__(
        self,
        node: LifecycleNode,
        settings: Settings,
        joints: Sequence[str],
        refused: Callable[[str], None],
    ) -> None:
        """Create the publishers.

        Raises
        ------
        ParameterError
            for an output that is not possible here, or gripper joints the bundle does not have.

        """
        self._node = node
        self._publishers: list[Any] = []
        self._client: Any = None
        self.stream: GripperStream | None = None
        gripper_joints = settings['gripper.joints'] or []
        unknown = [joint for joint in gripper_joints if joint not in joints]
        if unknown or len(set(gripper_joints)) >= len(joints):
            raise ParameterError(
                f'gripper.joints: expected some of the joints of the bundle {list(joints)}, '
                f'got {list(gripper_joints)}'
            )
        self.command = self._arm(settings['output'], refused)
        if gripper_joints:
            gripper = self._gripper(settings['gripper.output'])
            self.command = SplitSink(self.command, gripper, joints, gripper_joints)
        self.proposed = TopicSink(self._publisher(PROPOSED_TRAJECTORY))
        self.chunk_stats = self._publisher(CHUNK_STATS)
        self.plan_image = self._publisher(PLAN_IMAGE)

    def destroy(self) -> None:
        """Free the publishers."""
        for publisher in self._publishers:
            self._node.destroy_lifecycle_publisher(publisher)
        self._publishers.clear()
        if self._client is not None:
            self._client.destroy()
            self._client = None

    def _publisher(self, endpoint: Endpoint) -> Any:
        publisher = self._node.create_lifecycle_publisher(
            endpoint.kind, endpoint.name, endpoint.qos
        )
        self._publishers.append(publisher)
        return publisher

    def _arm(self, output: str, refused: Callable[[str], None]) -> TrajectorySink:
        if output == 'topic':
            return TopicSink(self._publisher(JOINT_TRAJECTORY))
        try:
            from control_msgs.action import FollowJointTrajectory
        except ImportError as error:
            raise ParameterError(
                f"output: expected control_msgs to be installed for 'action', got: {error}"
            ) from error
        from rclpy.action import ActionClient

        self._client = ActionClient(self._node, FollowJointTrajectory, ACTION)
        return ActionSink(self._client, FollowJointTrajectory.Goal, refused)

    def _gripper(self, output: str) -> TrajectorySink | None:
        if output == 'none':
            return None
        if output == 'joint_trajectory':
            return TopicSink(self._publisher(GRIPPER_TRAJECTORY))
        self.stream = GripperStream(self._publisher(GRIPPER_COMMANDS))
        return self.stream
