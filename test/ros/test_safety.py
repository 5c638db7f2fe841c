# SPDX-License-Identifier: Apache-2.0
"""The emergency stop as a topic: what is heard of it."""

from __future__ import annotations

import time

import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')

import rclpy
from rclpy.executors import SingleThreadedExecutor
from std_msgs.msg import Bool

from tts_policy.ros.gate import OutputGate
from tts_policy.ros.safety import SafetyInputs


@pytest.mark.fault
def test_a_stop_that_a_heartbeat_follows_at_once_is_heard(ros: None) -> None:
    node, gate = rclpy.create_node('stopped'), OutputGate()
    SafetyInputs(node, gate, lambda: None)
    publisher = node.create_publisher(Bool, 'emergency_stop', 100)
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    end_s = time.monotonic() + 10.0
    while publisher.get_subscription_count() == 0 and time.monotonic() < end_s:
        executor.spin_once(timeout_sec=0.05)
    # As while the node is busy: nothing is taken before all of it has come.
    for stop in (True, *[False] * 20):
        publisher.publish(Bool(data=stop))
    while gate.stopped is None and time.monotonic() < end_s:
        executor.spin_once(timeout_sec=0.05)
    executor.shutdown()
    node.destroy_node()
    assert gate.stopped == 'emergency stop'
