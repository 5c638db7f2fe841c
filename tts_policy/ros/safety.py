# SPDX-License-Identifier: Apache-2.0
"""Topics and service that decide whether and within which limits the arm may be moved."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from tts_policy.ros.interface import CLEAR_STOP, EMERGENCY_STOP, ROBOT_DESCRIPTION
from tts_policy.ros.limit_source import OFF

if TYPE_CHECKING:
    from collections.abc import Callable

    from rclpy.node import Node
    from std_msgs.msg import Bool, String
    from std_srvs.srv import Trigger

    from tts_policy.ros.gate import OutputGate


class SafetyInputs:
    """Emergency stop, its service, and the robot description.

    The stop is heard from the start of the process on, so that it also counts what came before
    configure; `stopped` is called after a message closed the gate.
    """

    def __init__(self, node: Node, gate: OutputGate, stopped: Callable[[], None]) -> None:
        self._node = node
        self._gate = gate
        self._stopped = stopped
        self._description: Any = None
        stop = EMERGENCY_STOP
        node.create_subscription(stop.kind, stop.name, self._on_stop, stop.qos)
        node.create_service(CLEAR_STOP.kind, CLEAR_STOP.name, self._on_clear)

    def listen(self, urdf: str, describe: Callable[[str], None]) -> None:
        """Take robot descriptions from now on, unless `urdf` says off."""
        if urdf != OFF:
            topic = ROBOT_DESCRIPTION
            self._description = self._node.create_subscription(
                topic.kind, topic.name, self._on_description, topic.qos
            )
            self._describe = describe

    def stop_listening(self) -> None:
        """Take no more robot descriptions."""
        if self._description is not None:
            self._node.destroy_subscription(self._description)
            self._description = None

    def _on_stop(self, message: Bool) -> None:
        self._gate.hear(message.data, time.monotonic())
        if message.data:
            self._stopped()

    def _on_description(self, message: String) -> None:
        self._describe(message.data)

    def _on_clear(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        refused = self._gate.reopen(time.monotonic())
        response.success = refused is None
        response.message = refused or 'the stop is forgotten; enable_output counts again'
        return response
