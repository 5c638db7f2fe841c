# SPDX-License-Identifier: Apache-2.0
"""Where commands can go: the kinds of output by name, and the sinks of one configured node.

A new kind of output is a sink (`control.output.TrajectorySink`) in a file of its own and a line in
`ARM_OUTPUTS` or `GRIPPER_OUTPUTS`; the parameters `output` and `gripper.output` offer it then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tts_policy.node.interface import (
    GRIPPER_COMMANDS,
    GRIPPER_TRAJECTORY,
    JOINT_TRAJECTORY,
    PROPOSED_TRAJECTORY,
    Endpoint,
)
from tts_policy.node.sinks import ActionSink, GripperStream, SplitSink, TopicSink

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rclpy.lifecycle import LifecycleNode

    from tts_policy.control.output import TrajectorySink

ACTION = 'follow_joint_trajectory'


class Outputs:
    """The sinks of a configured node: `command` moves the robot, `proposed` is the dry run.

    `refused` hears of commands that a controller did not take; a streamed output sends a set-point
    every `period_s`.
    """

    def __init__(
        self, node: LifecycleNode, period_s: float, refused: Callable[[str], None]
    ) -> None:
        self.node = node
        self.period_s = period_s
        self.refused = refused
        self._closing: list[Callable[[], object]] = []
        self.proposed = TopicSink(self.publisher(PROPOSED_TRAJECTORY))
        self.command: TrajectorySink = self.proposed

    def open(
        self, arm: str, gripper: str, joints: Sequence[str], gripper_joints: Sequence[str]
    ) -> None:
        """Create the chosen outputs of the arm's and the gripper's joints.

        Raises
        ------
        ValueError
            for an output that is not possible here, or gripper joints the bundle does not have.

        """
        unknown = [joint for joint in gripper_joints if joint not in joints]
        if unknown or len(set(gripper_joints)) >= len(joints):
            raise ValueError(
                f'gripper.joints: expected some of the joints of the bundle {list(joints)}, '
                f'got {list(gripper_joints)}'
            )
        self.command = ARM_OUTPUTS[arm](self)
        if gripper_joints:
            gripper_sink = GRIPPER_OUTPUTS[gripper](self)
            self.command = SplitSink(self.command, gripper_sink, joints, gripper_joints)

    def publisher(self, endpoint: Endpoint) -> Any:
        """Create a publisher that lives until `close`."""
        publisher = self.node.create_lifecycle_publisher(
            endpoint.kind, endpoint.name, endpoint.qos
        )
        self.on_close(lambda: self.node.destroy_lifecycle_publisher(publisher))
        return publisher

    def on_close(self, destroy: Callable[[], object]) -> None:
        """Call `destroy` when the outputs are closed."""
        self._closing.append(destroy)

    def close(self) -> None:
        """Destroy all that was created."""
        for destroy in self._closing:
            destroy()
        self._closing.clear()


def _action(outputs: Outputs) -> ActionSink:
    try:
        from control_msgs.action import FollowJointTrajectory
    except ImportError as error:
        raise ValueError(
            f"output: expected control_msgs to be installed for 'action', got: {error}"
        ) from error
    from rclpy.action import ActionClient

    client = ActionClient(outputs.node, FollowJointTrajectory, ACTION)
    outputs.on_close(client.destroy)
    return ActionSink(client, FollowJointTrajectory.Goal, outputs.refused)


def _stream(outputs: Outputs) -> GripperStream:
    sink = GripperStream(outputs.publisher(GRIPPER_COMMANDS))
    node = outputs.node
    timer = node.create_timer(
        outputs.period_s, lambda: sink.stream(int(node.get_clock().now().nanoseconds))
    )
    outputs.on_close(lambda: node.destroy_timer(timer))
    return sink


ARM_OUTPUTS: dict[str, Callable[[Outputs], TrajectorySink]] = {
    'topic': lambda outputs: TopicSink(outputs.publisher(JOINT_TRAJECTORY)),
    'action': _action,
}
GRIPPER_OUTPUTS: dict[str, Callable[[Outputs], TrajectorySink | None]] = {
    'joint_trajectory': lambda outputs: TopicSink(outputs.publisher(GRIPPER_TRAJECTORY)),
    'float64_multi_array': _stream,
    'none': lambda outputs: None,
}
