# SPDX-License-Identifier: Apache-2.0
"""Emergency stop and robot description as topics: what is heard of them, from whom."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from std_msgs.msg import Bool, String

from tts_policy.control.gate import OutputGate
from tts_policy.node.safety import SafetyInputs

LIMIT_S = 20.0


def spin_until(node: Node, condition: Callable[[], bool]) -> bool:
    """Serve the node until the condition holds; False after the limit."""
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    end_s = time.monotonic() + LIMIT_S
    while not condition() and time.monotonic() < end_s:
        executor.spin_once(timeout_sec=0.05)
    executor.shutdown()
    return condition()


@pytest.mark.fault
@pytest.mark.parametrize(
    'reliability', [ReliabilityPolicy.RELIABLE, ReliabilityPolicy.BEST_EFFORT]
)
def test_a_stop_that_a_heartbeat_follows_at_once_is_heard_from_every_publisher(
    ros: None, reliability: ReliabilityPolicy
) -> None:
    node, gate = rclpy.create_node('stopped'), OutputGate()
    SafetyInputs(node, gate, lambda: None)
    qos = QoSProfile(depth=100, reliability=reliability)
    publisher = node.create_publisher(Bool, 'emergency_stop', qos)
    matching = 2 if reliability is ReliabilityPolicy.RELIABLE else 1
    assert spin_until(node, lambda: publisher.get_subscription_count() == matching)
    # As while the node is busy: nothing is taken before all of it has come.
    for stop in (True, *[False] * 20):
        publisher.publish(Bool(data=stop))
    assert spin_until(node, lambda: gate.stopped is not None)
    node.destroy_node()
    assert gate.stopped == 'emergency stop'


def test_a_configure_that_takes_long_is_no_silence_of_a_dead_mans_switch(ros: None) -> None:
    pytest.importorskip('torch', reason='torch is not installed')
    from tts_policy.node.policy_node import PolicyNode

    def load(*_: object) -> None:
        raise ValueError('loaded for long, and in vain')

    node = PolicyNode(load=load)  # type: ignore[arg-type]
    node._gate.timeout_s = 0.5
    node._gate.hear(False, time.monotonic() - 3.0)
    node.trigger_configure()
    closed, stopped = node._gate.closed_by(time.monotonic()), node._gate.stopped
    node.destroy_node()
    assert stopped is None
    assert closed is not None and 'nothing received yet' in closed


@pytest.mark.fault
def test_a_short_stop_while_the_policy_loads_closes_the_gate_whatever_follows(ros: None) -> None:
    pytest.importorskip('torch', reason='torch is not installed')
    from tts_policy.node.policy_node import PolicyNode

    other = rclpy.create_node('operator')
    qos = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
    publisher = other.create_publisher(Bool, 'emergency_stop', qos)

    def load(*_: object) -> None:
        # More messages than the queue holds, at a pace that the node can take them.
        for count in range(600):
            publisher.publish(Bool(data=count == 0))
            time.sleep(0.002)
        raise ValueError('loaded in vain')

    node = PolicyNode(load=load)  # type: ignore[arg-type]
    assert spin_until(node, lambda: publisher.get_subscription_count() == 2)
    node.trigger_configure()
    stopped = node._gate.stopped
    node.destroy_node()
    other.destroy_node()
    assert stopped == 'emergency stop'


@pytest.mark.parametrize('latched', [True, False])
def test_a_robot_description_is_heard_once_from_latched_and_volatile_publishers(
    ros: None, latched: bool
) -> None:
    node = rclpy.create_node('described')
    inputs = SafetyInputs(node, OutputGate(), lambda: None)
    durability = DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE
    qos = QoSProfile(depth=1, durability=durability)
    publisher = node.create_publisher(String, 'robot_description', qos)
    if latched:
        publisher.publish(String(data='before'))
    heard: list[str] = []
    inputs.listen('when_present', heard.append)
    matching = 2 if latched else 1
    assert spin_until(node, lambda: publisher.get_subscription_count() == matching)
    if latched:
        assert spin_until(node, lambda: 'before' in heard)
    for text in ('now', 'end'):
        publisher.publish(String(data=text))
        assert spin_until(node, lambda text=text: text in heard)
    inputs.stop_listening()
    node.destroy_node()
    assert heard == [*(['before'] if latched else []), 'now', 'end']
