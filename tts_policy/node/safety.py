# SPDX-License-Identifier: Apache-2.0
"""Topics and service that decide whether and within which limits the arm may be moved."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from tts_policy.control.limits import OFF
from tts_policy.node.interface import (
    BEST_EFFORT_STOP_QOS,
    CLEAR_STOP,
    EMERGENCY_STOP,
    ROBOT_DESCRIPTION,
    VOLATILE_QOS,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from rclpy.node import Node
    from std_msgs.msg import Bool, String
    from std_srvs.srv import Trigger

    from tts_policy.control.gate import OutputGate


class SafetyInputs:
    """Emergency stop, its service, and the robot description.

    The stop is heard from the start of the process on, so that it also counts what came before
    configure; `stopped` is called after a message closed the gate. While the executor is busy with
    something else, `hear` takes what has come: a queue keeps only so many messages.
    """

    def __init__(self, node: Node, gate: OutputGate, stopped: Callable[[], None]) -> None:
        self._node = node
        self._gate = gate
        self._stopped = stopped
        self._descriptions: list[Any] = []
        self._described: str | None = None
        stop = EMERGENCY_STOP
        self._stops = [
            node.create_subscription(stop.kind, stop.name, self._on_stop, qos)
            for qos in (stop.qos, BEST_EFFORT_STOP_QOS)
        ]
        node.create_service(CLEAR_STOP.kind, CLEAR_STOP.name, self._on_clear)

    def listen(self, urdf: str, describe: Callable[[str], None]) -> None:
        """Take robot descriptions from now on, unless `urdf` says off."""
        if urdf != OFF:
            topic = ROBOT_DESCRIPTION
            self._describe = describe
            self._descriptions = [
                self._node.create_subscription(topic.kind, topic.name, self._on_description, qos)
                for qos in (topic.qos, VOLATILE_QOS)
            ]

    def stop_listening(self) -> None:
        """Take no more robot descriptions."""
        for subscription in self._descriptions:
            self._node.destroy_subscription(subscription)
        self._descriptions.clear()
        self._described = None

    def hear(self) -> None:
        """Take the stop messages that have come; only where callbacks of the node may run."""
        for subscription in self._stops:
            with subscription.handle:
                while taken := subscription.handle.take_message(subscription.msg_type, False):
                    self._on_stop(taken[0])

    def _on_stop(self, message: Bool) -> None:
        self._gate.hear(message.data, time.monotonic())
        if message.data:
            self._stopped()

    def _on_description(self, message: String) -> None:
        # A latched publisher is heard by both subscriptions.
        if message.data != self._described:
            self._described = message.data
            self._describe(message.data)

    def _on_clear(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        refused = self._gate.reopen(time.monotonic())
        response.success = refused is None
        response.message = refused or 'the stop is cleared; enable_output decides again'
        return response
