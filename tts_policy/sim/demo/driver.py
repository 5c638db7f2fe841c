# SPDX-License-Identifier: Apache-2.0
"""Drives episodes from outside: one ROS node that resets robot and policy, and records topics.

Every wait has a limit, and while the driver waits it watches the child processes. The robot leaves
a gap in the stamps at every reset, so stamps tell to which episode a message belongs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import rclpy
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from numpy.typing import NDArray
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.parameter_client import AsyncParameterClient
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from tts_policy.control.conversions import joint_positions, time_to_ns
from tts_policy.control.images import raw_to_rgb
from tts_policy.sim.demo.processes import DemoError

ROBOT, POLICY = 'robot', 'tts_policy'
CAMERA, STATES, COMMANDS = 'camera/image', 'joint_states', 'joint_trajectory'
START_LIMIT_S = 180.0
CALL_LIMIT_S = 20.0
SILENCE_LIMIT_S = 90.0
REST_LIMIT_S = 3.0
SPIN_S = 0.05
RESET_GAP_NS = 1_000_000_000  # the robot's default


@dataclass(frozen=True)
class Command:
    """A commanded trajectory: due times [P] in ns of the stamps' clock, positions [P, J]."""

    stamp_ns: int
    due_ns: NDArray[np.int64]
    positions: NDArray[np.float64]


@dataclass
class EpisodeRecord:
    """The messages of one episode, each list in the order of arrival.

    ticks: reports of ~/chunk_stats; images: uint8 [H, W, 3]; states: [J] of `joints`, rad or m;
    report: the robot's ~/episode.
    """

    joints: tuple[str, ...]
    ticks: list[dict[str, Any]] = field(default_factory=list)
    images: list[tuple[int, NDArray[np.uint8]]] = field(default_factory=list)
    states: list[tuple[int, NDArray[np.float64]]] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def success(self) -> bool:
        """Whether the task was done."""
        return bool(self.report.get('success'))

    @property
    def seed(self) -> int:
        """Seed of the episode."""
        return int(self.report['seed'])


class EpisodeDriver:
    """The demo's node, served only while it waits for something."""

    def __init__(self, domain: int, joints: Sequence[str], watch: Callable[[], None]) -> None:
        """Join the domain; `watch` is called while waiting and may raise."""
        self._joints = tuple(joints)
        self._watch = watch
        self._record = EpisodeRecord(self._joints)
        self._after_ns = self._newest_ns = 0
        self._heard_s = time.monotonic()
        self._context = rclpy.Context()
        rclpy.init(context=self._context, domain_id=domain)
        self._node = rclpy.create_node('demo', context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self._subscribe()
        create = self._node.create_client
        self._robot_reset = create(Trigger, f'{ROBOT}/reset')
        self._policy_reset = create(Trigger, f'{POLICY}/reset')
        self._change_state = create(ChangeState, f'{POLICY}/change_state')
        self._parameters = {
            name: AsyncParameterClient(self._node, name) for name in (ROBOT, POLICY)
        }

    def _subscribe(self) -> None:
        reliable = QoSProfile(depth=200, reliability=ReliabilityPolicy.RELIABLE)
        latched = QoSProfile(
            depth=1,
            reliability=ReliabilityPolicy.RELIABLE,
            durability=DurabilityPolicy.TRANSIENT_LOCAL,
        )
        for kind, topic, callback, qos in (
            (Image, CAMERA, self._on_image, reliable),
            (JointState, STATES, self._on_state, reliable),
            (JointTrajectory, COMMANDS, self._on_command, reliable),
            (String, f'{POLICY}/chunk_stats', self._on_tick, reliable),
            (String, f'{ROBOT}/episode', self._on_report, latched),
        ):
            self._node.create_subscription(kind, topic, callback, qos)

    # Messages in

    def _accept(self, stamp_ns: int) -> bool:
        """Whether a message with that stamp belongs to the present episode."""
        self._heard_s = time.monotonic()
        self._newest_ns = max(self._newest_ns, stamp_ns)
        return stamp_ns > self._after_ns

    def _on_image(self, message: Image) -> None:
        stamp_ns = time_to_ns(message.header.stamp)
        if self._accept(stamp_ns):
            image = raw_to_rgb(message, message.height, message.width, CAMERA)
            self._record.images.append((stamp_ns, image))

    def _on_state(self, message: JointState) -> None:
        stamp_ns = time_to_ns(message.header.stamp)
        if self._accept(stamp_ns):
            state = joint_positions(message, self._joints, STATES)
            self._record.states.append((stamp_ns, state))

    def _on_command(self, message: JointTrajectory) -> None:
        stamp_ns = time_to_ns(message.header.stamp)
        if not self._accept(stamp_ns):
            return
        order = [message.joint_names.index(name) for name in self._joints]
        due = [stamp_ns + time_to_ns(point.time_from_start) for point in message.points]
        positions = np.array([point.positions for point in message.points])[:, order]
        self._record.commands.append(Command(stamp_ns, np.array(due, np.int64), positions))

    def _on_tick(self, message: String) -> None:
        tick = json.loads(message.data)
        if self._accept(tick['stamp_ns']):
            self._record.ticks.append(tick)

    def _on_report(self, message: String) -> None:
        self._heard_s = time.monotonic()
        self._record.report = json.loads(message.data)

    # Waiting

    def _serve(self, condition: Callable[[], bool], limit_s: float) -> bool:
        """Serve messages until the condition holds; False if it does not after limit_s."""
        end_s = time.monotonic() + limit_s
        while not condition():
            self._watch()
            if time.monotonic() > end_s:
                return False
            self._executor.spin_once(timeout_sec=SPIN_S)
        return True

    def _wait(self, condition: Callable[[], bool], limit_s: float, what: str) -> None:
        if not self._serve(condition, limit_s):
            raise DemoError(f'{what}: expected within {limit_s:g} s, got nothing')

    def _call(self, client: Any, request: Any, limit_s: float = CALL_LIMIT_S) -> Any:
        name = client.srv_name
        self._wait(client.service_is_ready, START_LIMIT_S, f'service {name}')
        future = client.call_async(request)
        self._wait(future.done, limit_s, f'answer of {name}')
        return future.result()

    # Steps of the demo

    def set_parameter(self, node: str, name: str, value: float | int) -> None:
        """Set a parameter of a node; raises DemoError with the node's reason if it is refused."""
        client = self._parameters[node]
        self._wait(client.services_are_ready, START_LIMIT_S, f'parameter services of {node}')
        future = client.set_parameters([Parameter(name, value=value)])
        self._wait(future.done, CALL_LIMIT_S, f'answer of {node} to {name}')
        result = future.result().results[0]
        if not result.successful:
            raise DemoError(f'{node} refused {name} {value}: {result.reason}')

    def start_policy(self) -> bool:
        """Configure and activate the policy node, wait for its topics; False if it refuses."""
        for transition in (Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE):
            request = ChangeState.Request(transition=Transition(id=transition))
            if not self._call(self._change_state, request, START_LIMIT_S).success:
                return False
        self._wait(self._connected, CALL_LIMIT_S, 'topics of robot and policy')
        return True

    def _connected(self) -> bool:
        """Whether robot, policy and driver all see each other's topics."""
        publishers, subscribers = self._node.count_publishers, self._node.count_subscribers
        return (
            all(publishers(topic) for topic in (CAMERA, STATES, COMMANDS))
            and all(subscribers(topic) > 1 for topic in (CAMERA, STATES, COMMANDS))
            and publishers(f'{POLICY}/chunk_stats') > 0
        )

    def await_policy_gone(self) -> None:
        """Wait until nothing of an ended policy node is left in the graph."""

        def gone() -> bool:
            return not (
                self._change_state.service_is_ready()
                or self._policy_reset.service_is_ready()
                or self._node.count_publishers(COMMANDS)
            )

        self._wait(gone, START_LIMIT_S, 'end of the policy node')

    def run_episode(self, on_tick: Callable[[EpisodeRecord], None]) -> EpisodeRecord:
        """Reset policy and robot, follow the episode to its end.

        Raises
        ------
        DemoError
            when a node dies or falls silent, or when reports of the policy are missing.

        """
        self._reset(self._policy_reset)
        # Late messages of the last episode are stamped before the gap.
        self._after_ns = self._newest_ns + RESET_GAP_NS // 2
        self._record = record = EpisodeRecord(self._joints)
        self._heard_s = time.monotonic()
        self._reset(self._robot_reset)
        shown = 0
        while not record.report:
            self._watch()
            self._executor.spin_once(timeout_sec=SPIN_S)
            if len(record.ticks) > shown:
                shown = len(record.ticks)
                on_tick(record)
            if time.monotonic() - self._heard_s > SILENCE_LIMIT_S:
                raise DemoError(f'robot: expected a message every {SILENCE_LIMIT_S:g} s, got none')
        # Other topics may deliver what was sent before the report only after it.
        frames, ticks = record.report['frames'], record.report['trajectories']
        self._serve(
            lambda: len(record.images) >= frames and len(record.ticks) >= ticks, REST_LIMIT_S
        )
        if len(record.ticks) < ticks:
            raise DemoError(
                f'seed {record.seed}: expected {ticks} tick reports of the policy, '
                f'got {len(record.ticks)}'
            )
        return record

    def _reset(self, client: Any) -> None:
        answer = self._call(client, Trigger.Request())
        if not answer.success:
            raise DemoError(f'{client.srv_name} refused: {answer.message}')

    def close(self) -> None:
        """Leave the domain."""
        self._executor.shutdown()
        self._node.destroy_node()
        self._context.try_shutdown()
