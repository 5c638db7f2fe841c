# SPDX-License-Identifier: Apache-2.0
"""A scripted robot for tests: publishes camera and joints, and collects what the policy says."""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from processes import wait_until
from rcl_interfaces.srv import DescribeParameters, SetParameters
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Bool, String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from tts_policy.node.messages import ns_to_time

if TYPE_CHECKING:
    from collections.abc import Callable

    from rclpy.node import Node

HEIGHT, WIDTH = 24, 32
JOINTS = ('shoulder', 'elbow', 'finger')
JOINT_PERIOD_S = 0.01
FRAME_EVERY = 5
IN_FLIGHT = 8
RELIABLE = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
LATCHED = QoSProfile(
    depth=1,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)
TRANSITIONS = {
    'configure': Transition.TRANSITION_CONFIGURE,
    'activate': Transition.TRANSITION_ACTIVATE,
    'deactivate': Transition.TRANSITION_DEACTIVATE,
    'cleanup': Transition.TRANSITION_CLEANUP,
}


def image_message(stamp_ns: int) -> Image:
    """Return a valid camera image whose content depends on the stamp."""
    pixels = np.random.default_rng(stamp_ns % 2**32).integers(0, 256, HEIGHT * WIDTH * 3, np.uint8)
    message = Image(
        height=HEIGHT, width=WIDTH, encoding='rgb8', step=WIDTH * 3, data=pixels.tobytes()
    )
    message.header.stamp = ns_to_time(stamp_ns)
    return message


def joint_message(stamp_ns: int) -> JointState:
    """Return a valid joint state, in another order than the contract's, with one joint more."""
    message = JointState(
        name=['finger', 'spare', 'elbow', 'shoulder'], position=[0.1, 9, 0.2, 0.3]
    )
    message.header.stamp = ns_to_time(stamp_ns)
    return message


class Feeder:
    """Topics and services around one policy node.

    `spoil_image` and `spoil_joints` may change or, returning None, hold back a message; a list is
    published one by one. `period_s` is the pause between joint states.
    """

    def __init__(self, node: Node, namespace: str = '') -> None:
        self.node = node
        self.period_s = JOINT_PERIOD_S
        self.spoil_image: Callable[[Image], Any] = lambda message: message
        self.spoil_joints: Callable[[JointState], Any] = lambda message: message
        self.commands: list[JointTrajectory] = []
        self.proposals: list[JointTrajectory] = []
        self.ticks: list[dict[str, Any]] = []
        self.status: DiagnosticStatus | None = None
        self._policy = f'{namespace}/tts_policy'
        self._clients: dict[str, Any] = {}
        self._images = node.create_publisher(Image, f'{namespace}/camera/image', RELIABLE)
        self._states = node.create_publisher(JointState, f'{namespace}/joint_states', RELIABLE)
        self._clock = node.create_publisher(Clock, '/clock', RELIABLE)
        self._stop = node.create_publisher(Bool, f'{namespace}/emergency_stop', RELIABLE)
        self._description = node.create_publisher(
            String, f'{namespace}/robot_description', LATCHED
        )
        self._fault = node.create_publisher(String, f'{self._policy}/fault', RELIABLE)
        self._subscriptions = [
            node.create_subscription(kind, topic, callback, RELIABLE)
            for kind, topic, callback in (
                (JointTrajectory, f'{namespace}/joint_trajectory', self.commands.append),
                (JointTrajectory, f'{self._policy}/proposed_trajectory', self.proposals.append),
                (String, f'{self._policy}/chunk_stats', self._on_tick),
                (DiagnosticArray, '/diagnostics', self._on_diagnostics),
            )
        ]
        self._running = threading.Event()
        self._thread: threading.Thread | None = None

    def _on_tick(self, message: String) -> None:
        self.ticks.append(json.loads(message.data))

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            if status.name == f'{self._policy.lstrip("/")}: policy':
                self.status = status

    def values(self) -> dict[str, str]:
        """Return the key-value pairs of the last diagnostics."""
        return {} if self.status is None else {v.key: v.value for v in self.status.values}

    def forget(self) -> None:
        """Drop all that was collected so far."""
        self.commands.clear()
        self.proposals.clear()
        self.ticks.clear()
        self.status = None

    # Publishing

    def start(self) -> None:
        """Publish in real time until `stop`."""
        self._running.set()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop publishing."""
        self._running.clear()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run_forever(self) -> None:
        self._running.set()
        self._run()

    def _run(self) -> None:
        due_s = time.monotonic()
        count = 0
        while self._running.is_set():
            self.publish(time.time_ns(), picture=count % FRAME_EVERY == 0)
            count += 1
            due_s += self.period_s
            time.sleep(max(0.0, due_s - time.monotonic()))

    def publish(self, stamp_ns: int, picture: bool) -> None:
        """Publish one joint state and perhaps an image, with the very same stamp."""
        self._publish(self._states, self.spoil_joints(joint_message(stamp_ns)))
        if picture:
            self._publish(self._images, self.spoil_image(image_message(stamp_ns)))

    @staticmethod
    def _publish(publisher: Any, spoiled: Any) -> None:
        for message in spoiled if isinstance(spoiled, list) else [spoiled]:
            if message is not None:
                publisher.publish(message)

    def emergency_stop(self, stop: bool) -> None:
        """Publish one message of the stop topic."""
        self._stop.publish(Bool(data=stop))

    def describe_robot(self, urdf: str) -> None:
        """Publish a robot description."""
        self._description.publish(String(data=urdf))

    def inject(self, fault: str) -> None:
        """Tell the policy of `faulty_node` what to do wrong."""
        self._fault.publish(String(data=fault))

    def publish_clock(self, stamp_ns: int) -> None:
        """Publish simulated time."""
        self._clock.publish(Clock(clock=ns_to_time(stamp_ns)))

    @property
    def matched(self) -> bool:
        """Whether the policy listens to both sensors, and its chunks will be heard.

        That a publisher is known here does not mean that it knows its subscribers. It learns of
        them in the order in which they were made, of that of its diagnostics last.
        """
        return bool(
            self.status is not None
            and self._images.get_subscription_count()
            and self._states.get_subscription_count()
            and self.node.count_publishers(f'{self._policy}/chunk_stats')
            and self.node.count_publishers(f'{self._policy}/proposed_trajectory')
        )

    def silent(self, quiet_s: float = 0.6) -> None:
        """Wait until no command has come for a while: one may still have been on its way."""
        count, since_s = len(self.commands), time.monotonic()

        def quiet() -> bool:
            nonlocal count, since_s
            if len(self.commands) != count:
                count, since_s = len(self.commands), time.monotonic()
            return time.monotonic() - since_s > quiet_s

        wait_until(quiet, 4, 'an end of the commands')
        self.commands.clear()

    # Services

    def _call(
        self, kind: Any, name: str, request: Any, timeout_s: float = 15.0, times: int = 1
    ) -> Any:
        """Ask a service; what may be asked twice is, as a server can know its client too late."""
        client = self._client(kind, name, timeout_s)
        done, futures = threading.Event(), []
        for _ in range(times):
            futures.append(client.call_async(request))
            futures[-1].add_done_callback(lambda _: done.set())
            if done.wait(timeout_s):
                return next(future.result() for future in futures if future.done())
        pytest.fail(f'no answer from {name}, asked {times} times')

    def _client(self, kind: Any, name: str, timeout_s: float = 15.0) -> Any:
        if name not in self._clients:
            self._clients[name] = self.node.create_client(kind, f'{self._policy}/{name}')
        assert self._clients[name].wait_for_service(timeout_s), f'no service {name}'
        return self._clients[name]

    def change(self, transition: str) -> bool:
        """Ask for a lifecycle transition."""
        request = ChangeState.Request(transition=Transition(id=TRANSITIONS[transition]))
        return bool(self._call(ChangeState, 'change_state', request).success)

    def ask(self, transition: str) -> None:
        """Ask for a transition that is not possible: rclpy does not answer then."""
        request = ChangeState.Request(transition=Transition(id=TRANSITIONS[transition]))
        self._client(ChangeState, 'change_state').call_async(request)

    def state(self) -> str:
        """Return the lifecycle state."""
        answer = self._call(GetState, 'get_state', GetState.Request(), times=3)
        return str(answer.current_state.label)

    def set(self, **values: Any) -> str:
        """Set parameters (`__` stands for a dot); returns '' or the reason of the refusal."""
        request = self._request(values)
        results = self._call(SetParameters, 'set_parameters', request, times=3).results
        return '; '.join(r.reason or 'refused' for r in results if not r.successful)

    def set_all(self, changes: list[dict[str, Any]], timeout_s: float = 60.0) -> int:
        """Send many requests, some always in flight; returns how many were granted."""
        client = self._client(SetParameters, 'set_parameters')
        end_s = time.monotonic() + timeout_s
        futures: list[Any] = []
        for values in changes:
            # A service keeps ten requests and forgets the oldest of more.
            while sum(not future.done() for future in futures[-IN_FLIGHT:]) >= IN_FLIGHT:
                assert time.monotonic() < end_s, 'no answer from set_parameters'
                time.sleep(0.001)
            futures.append(client.call_async(self._request(values)))
        while not all(future.done() for future in futures):
            assert time.monotonic() < end_s, 'no answer from set_parameters'
            time.sleep(0.01)
        return sum(all(r.successful for r in future.result().results) for future in futures)

    @staticmethod
    def _request(values: dict[str, Any]) -> SetParameters.Request:
        return SetParameters.Request(
            parameters=[
                Parameter(name.replace('__', '.'), value=value).to_parameter_msg()
                for name, value in values.items()
            ]
        )

    def describe(self, name: str) -> Any:
        """Return the descriptor of a parameter."""
        request = DescribeParameters.Request(names=[name])
        return self._call(DescribeParameters, 'describe_parameters', request).descriptors[0]

    def clear_stop(self) -> Trigger.Response:
        """Call ~/clear_stop of the policy."""
        return self._call(Trigger, 'clear_stop', Trigger.Request())

    def reset(self) -> Trigger.Response:
        """Call ~/reset of the policy."""
        return self._call(Trigger, 'reset', Trigger.Request())


def main() -> None:
    """Be a robot of its own: publish until killed."""
    import rclpy

    rclpy.init()
    Feeder(rclpy.create_node('robot'), *sys.argv[1:])._run_forever()


if __name__ == '__main__':
    main()
