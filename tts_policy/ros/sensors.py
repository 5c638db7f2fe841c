# SPDX-License-Identifier: Apache-2.0
"""Subscriptions of a contract's cameras and joints: convert, check, pass on.

Callbacks do no more than that. A message that does not fit is passed to `refuse` and goes nowhere
else.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from rclpy.qos import QoSProfile, ReliabilityPolicy, qos_profile_sensor_data
from sensor_msgs.msg import Image, JointState

from tts_policy.ros.conversions import (
    ConversionError,
    image_to_rgb,
    joint_positions,
    time_to_ns,
)

if TYPE_CHECKING:
    import numpy as np
    from rclpy.node import Node

    from tts_policy.core.contract import CameraSpec, PolicyContract

JOINT_TOPIC = 'joint_states'


def image_topic(key: str) -> str:
    """Relative topic of the camera of that key."""
    return f'{key}/image'


class SensorReceiver(Protocol):
    """Who gets what the sensors send."""

    def on_sample(self, key: str, topic: str, stamp_ns: int, value: np.ndarray) -> None:
        """Take one sample of the observation: `key` as in the contract."""

    def on_measured(self, stamp_ns: int, positions: np.ndarray) -> None:
        """Take the measured positions [A] of the action's joints."""

    def on_refused(self, topic: str, error: ConversionError) -> None:
        """Hear of a message that does not fit the contract."""


class Sensors:
    """The subscriptions of one contract."""

    def __init__(
        self, node: Node, contract: PolicyContract, reliable: bool, receiver: SensorReceiver
    ) -> None:
        self._node = node
        self._receiver = receiver
        self._observed = len(contract.observation.joints)
        self._names = list(dict.fromkeys((*contract.observation.joints, *contract.action.joints)))
        self._acted = [self._names.index(name) for name in contract.action.joints]
        qos: QoSProfile = qos_profile_sensor_data
        if reliable:
            qos = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
        topics: list[tuple[Any, str, Any]] = [
            (Image, image_topic(camera.key), partial(self._on_image, camera))
            for camera in contract.observation.cameras
        ]
        topics.append((JointState, JOINT_TOPIC, self._on_joint_state))
        self._subscriptions = [node.create_subscription(*topic, qos) for topic in topics]

    def destroy(self) -> None:
        """End the subscriptions."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()

    def _on_image(self, camera: CameraSpec, msg: Image) -> None:
        topic = image_topic(camera.key)
        try:
            image = image_to_rgb(msg, camera.height, camera.width, topic)
        except ConversionError as error:
            self._receiver.on_refused(topic, error)
            return
        self._receiver.on_sample(camera.key, topic, time_to_ns(msg.header.stamp), image)

    def _on_joint_state(self, msg: JointState) -> None:
        try:
            values = joint_positions(msg, self._names, JOINT_TOPIC)
        except ConversionError as error:
            self._receiver.on_refused(JOINT_TOPIC, error)
            return
        stamp_ns = time_to_ns(msg.header.stamp)
        self._receiver.on_measured(stamp_ns, values[self._acted])
        self._receiver.on_sample('joints', JOINT_TOPIC, stamp_ns, values[: self._observed])
