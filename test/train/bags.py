# SPDX-License-Identifier: Apache-2.0
"""Writes small recordings with rosbags, as any robot could have made them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from tts_policy.sim.panda import COMMAND_JOINTS as JOINTS

MS = 1_000_000
STORE = get_typestore(Stores.ROS2_JAZZY)
TYPES = STORE.types


@dataclass
class Recording:
    """An episode whose joint j at time t is t + j, and whose command leads it by `lead_ns`.

    The brightness of frame f is f. Joint states come every `state_ns`, commands with every frame.
    """

    frames: int = 10
    period_ns: int = 50 * MS
    state_ns: int = 10 * MS
    size: int = 96
    encoding: str = 'rgb8'
    joints: tuple[str, ...] = (*reversed(JOINTS), 'another_joint')
    joint_offset_ns: int = 0
    drop_frame: int | None = None
    pause_after: int | None = None
    bad_value: float | None = None
    commands: bool = True
    # Joint states of these names come as well; those of our own joints have no positions.
    foreign_states: tuple[str, ...] = ()

    def value(self, joint: str, stamp_ns: int) -> float:
        """Ground truth of a joint."""
        return stamp_ns * 1e-9 + (JOINTS.index(joint) if joint in JOINTS else 99)

    def write(self, folder: Path) -> Path:
        """Write the bag and return its folder."""
        start = 1_000 * MS
        with Writer(folder, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
            self._writer = writer
            self._connections: dict[str, Any] = {}
            length = (self.frames - 1) * self.period_ns
            if self.pause_after is not None:
                length += 2_000 * MS
            for index in range(length // self.state_ns + 1):
                stamp = start + index * self.state_ns + self.joint_offset_ns
                self._put('/joint_states', stamp, self._state(stamp))
                if self.foreign_states:
                    self._put('/joint_states', stamp, self._foreign(stamp))
            for frame in range(self.frames):
                stamp = start + frame * self.period_ns
                if self.pause_after is not None and frame > self.pause_after:
                    stamp += 2_000 * MS
                if frame != self.drop_frame:
                    self._put('/camera/image', stamp, self._image(stamp, frame))
                if self.commands:
                    self._put('/joint_trajectory', stamp, self._command(stamp))
        return folder

    def _put(self, topic: str, stamp_ns: int, message: Any) -> None:
        if topic not in self._connections:
            self._connections[topic] = self._writer.add_connection(
                topic, message.__msgtype__, typestore=STORE
            )
        raw = STORE.serialize_cdr(message, message.__msgtype__)
        self._writer.write(self._connections[topic], stamp_ns, raw)

    def _header(self, stamp_ns: int) -> Any:
        stamp = TYPES['builtin_interfaces/msg/Time'](*divmod(stamp_ns, 1_000_000_000))
        return TYPES['std_msgs/msg/Header'](stamp, 'base')

    def _state(self, stamp_ns: int) -> Any:
        values = np.array([self.value(name, stamp_ns) for name in self.joints])
        if self.bad_value is not None:
            values[0] = self.bad_value
        nothing = np.zeros(0)
        return TYPES['sensor_msgs/msg/JointState'](
            self._header(stamp_ns), list(self.joints), values, nothing, nothing
        )

    def _foreign(self, stamp_ns: int) -> Any:
        names, nothing = list(self.foreign_states), np.zeros(0)
        positions = nothing if set(names) & set(JOINTS) else np.ones(len(names))
        return TYPES['sensor_msgs/msg/JointState'](
            self._header(stamp_ns), names, positions, np.ones(len(names)), nothing
        )

    def _image(self, stamp_ns: int, frame: int) -> Any:
        # Rows are padded, as the step field allows.
        step = 3 * self.size + 4
        data = np.full(self.size * step, frame, np.uint8)
        return TYPES['sensor_msgs/msg/Image'](
            self._header(stamp_ns), self.size, self.size, self.encoding, 0, step, data
        )

    def _command(self, stamp_ns: int) -> Any:
        """Two points, so that the set-point one period ahead has to be interpolated."""
        points = []
        for ahead in (30 * MS, 80 * MS):
            positions = np.array([self.value(name, stamp_ns + ahead) for name in JOINTS])
            due = TYPES['builtin_interfaces/msg/Duration'](0, ahead)
            nothing = np.zeros(0)
            points.append(
                TYPES['trajectory_msgs/msg/JointTrajectoryPoint'](
                    positions, nothing, nothing, nothing, due
                )
            )
        return TYPES['trajectory_msgs/msg/JointTrajectory'](
            self._header(stamp_ns), list(JOINTS), points
        )
