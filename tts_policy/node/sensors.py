# SPDX-License-Identifier: Apache-2.0
"""Subscriptions of a contract's cameras and joints: convert, check, pass on.

Callbacks do no more than that. A message that does not fit is passed to `refuse` and goes nowhere
else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from tts_policy.control.conversions import ConversionError, joint_positions, time_to_ns
from tts_policy.control.images import ImageFit, compressed_to_rgb, raw_to_rgb
from tts_policy.node.interface import (
    COMPRESSED_IMAGE,
    IMAGE,
    JOINT_STATES,
    RELIABLE_SENSOR_QOS,
    camera_topic,
    compressed_topic,
)

if TYPE_CHECKING:
    import numpy as np
    from rclpy.node import Node
    from sensor_msgs.msg import CompressedImage, Image, JointState

    from tts_policy.policy.contract import CameraSpec, PolicyContract

JOINT_TOPIC = JOINT_STATES.name


@dataclass(frozen=True)
class SensorOptions:
    """How the sensors come: which cameras compressed, of which size, with which QoS."""

    reliable: bool = False
    compressed: frozenset[str] = frozenset()
    fit: ImageFit = ImageFit.EXACT


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
        self,
        node: Node,
        contract: PolicyContract,
        options: SensorOptions,
        receiver: SensorReceiver,
    ) -> None:
        """Subscribe.

        Raises
        ------
        ValueError
            for a compressed camera that the bundle does not have.

        """
        cameras = contract.observation.cameras
        unknown = options.compressed - {camera.key for camera in cameras}
        if unknown:
            raise ValueError(
                f'compressed_cameras: expected cameras of the bundle '
                f'{[camera.key for camera in cameras]}, got {sorted(unknown)}'
            )
        self._node = node
        self._fit = options.fit
        self._receiver = receiver
        self._observed = len(contract.observation.joints)
        self._names = list(dict.fromkeys((*contract.observation.joints, *contract.action.joints)))
        self._acted = [self._names.index(name) for name in contract.action.joints]
        topics: list[tuple[Any, str, Any]] = [
            (COMPRESSED_IMAGE.kind, compressed_topic(key), partial(self._on_compressed, camera))
            if key in options.compressed
            else (IMAGE.kind, camera_topic(key), partial(self._on_image, camera))
            for camera in cameras
            for key in (camera.key,)
        ]
        topics.append((JOINT_STATES.kind, JOINT_TOPIC, self._on_joint_state))
        qos = RELIABLE_SENSOR_QOS if options.reliable else JOINT_STATES.qos
        self._subscriptions = [node.create_subscription(*topic, qos) for topic in topics]

    def destroy(self) -> None:
        """End the subscriptions."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()

    def _on_image(self, camera: CameraSpec, msg: Image) -> None:
        topic = camera_topic(camera.key)
        try:
            image = raw_to_rgb(msg, camera.height, camera.width, topic, self._fit)
        except ConversionError as error:
            self._receiver.on_refused(topic, error)
            return
        self._receiver.on_sample(camera.key, topic, time_to_ns(msg.header.stamp), image)

    def _on_compressed(self, camera: CameraSpec, msg: CompressedImage) -> None:
        topic = compressed_topic(camera.key)
        try:
            image = compressed_to_rgb(msg, camera.height, camera.width, topic, self._fit)
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
