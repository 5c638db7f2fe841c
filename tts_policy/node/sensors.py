# SPDX-License-Identifier: Apache-2.0
"""Subscriptions of a contract's cameras and joints: convert, check, store in the worker's window.

A message that does not fit the contract is reported and goes nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tts_policy.control.conversions import (
    LARGEST_POSITION,
    ConversionError,
    holds_positions_of_any,
    joint_positions,
    time_to_ns,
)
from tts_policy.control.images import ImageFit, compressed_to_rgb, raw_to_rgb
from tts_policy.control.observation import Arrival
from tts_policy.node.interface import (
    COMPRESSED_IMAGE,
    IMAGE,
    JOINT_STATES,
    RELIABLE_SENSOR_QOS,
    camera_topic,
    compressed_topic,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from rclpy.node import Node
    from sensor_msgs.msg import CompressedImage, Image, JointState

    from tts_policy.node.monitor import Monitor
    from tts_policy.node.worker import InferenceWorker
    from tts_policy.policy.contract import CameraSpec, PolicyContract

JOINT_TOPIC = JOINT_STATES.name


@dataclass(frozen=True)
class SensorOptions:
    """How the sensors come: which cameras compressed, of which size, with which QoS.

    A joint further out than `max_position` (rad or m) is not plausible.
    """

    reliable: bool = False
    compressed: frozenset[str] = frozenset()
    fit: ImageFit = ImageFit.EXACT
    max_position: float = LARGEST_POSITION


class Sensors:
    """The subscriptions of one contract."""

    def __init__(
        self,
        node: Node,
        contract: PolicyContract,
        options: SensorOptions,
        worker: InferenceWorker,
        monitor: Monitor,
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
        self._max_position = options.max_position
        self._worker = worker
        self._monitor = monitor
        self._observed = len(contract.observation.joints)
        self._names = list(dict.fromkeys((*contract.observation.joints, *contract.action.joints)))
        self._acted = [self._names.index(name) for name in contract.action.joints]
        qos = RELIABLE_SENSOR_QOS if options.reliable else JOINT_STATES.qos
        self._subscriptions = [
            node.create_subscription(JOINT_STATES.kind, JOINT_TOPIC, self._on_joint_state, qos)
        ]
        for camera in cameras:
            kind, topic, to_rgb = (
                (COMPRESSED_IMAGE.kind, compressed_topic(camera.key), compressed_to_rgb)
                if camera.key in options.compressed
                else (IMAGE.kind, camera_topic(camera.key), raw_to_rgb)
            )
            callback = partial(self._on_image, camera, topic, to_rgb)
            self._subscriptions.append(node.create_subscription(kind, topic, callback, qos))

    def destroy(self) -> None:
        """End the subscriptions."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()

    def _on_image(
        self,
        camera: CameraSpec,
        topic: str,
        to_rgb: Callable[..., np.ndarray],
        msg: Image | CompressedImage,
    ) -> None:
        try:
            image = to_rgb(msg, camera.height, camera.width, topic, self._fit)
        except ConversionError as error:
            self._refuse(topic, error)
            return
        self._store(camera.key, topic, msg, image)

    def _on_joint_state(self, msg: JointState) -> None:
        if not holds_positions_of_any(msg, self._names):
            return
        try:
            values = joint_positions(msg, self._names, JOINT_TOPIC, self._max_position)
        except ConversionError as error:
            self._refuse(JOINT_TOPIC, error)
            return
        observed, measured = values[: self._observed], values[self._acted]
        self._store('joints', JOINT_TOPIC, msg, observed, measured)

    def _store(self, key: str, topic: str, msg: Any, *value: np.ndarray) -> None:
        stamp_ns = time_to_ns(msg.header.stamp)
        arrival = self._worker.store(key, stamp_ns, *value)
        if arrival in (Arrival.LATE, Arrival.FUTURE):
            ahead_s = (stamp_ns - int(self._node.get_clock().now().nanoseconds)) * 1e-9
            text = f'{topic}: message is {arrival.value}, stamped {ahead_s:+.3f} s from now'
            self._monitor.warn(topic, text)

    def _refuse(self, topic: str, error: ConversionError) -> None:
        if self._worker.active:
            self._monitor.refuse_message(topic, str(error))
