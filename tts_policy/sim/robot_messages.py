# SPDX-License-Identifier: Apache-2.0
"""Messages of the simulated robot: arrays and names to ROS, trajectories from ROS."""

from __future__ import annotations

import array

import numpy as np
from builtin_interfaces.msg import Time
from sensor_msgs.msg import Image, JointState
from trajectory_msgs.msg import JointTrajectory

from tts_policy.sim.trajectory_player import NS_PER_S, TrajectoryPoint


def to_stamp(stamp_ns: int) -> Time:
    """builtin_interfaces Time of nanoseconds."""
    seconds, nanoseconds = divmod(stamp_ns, NS_PER_S)
    return Time(sec=seconds, nanosec=nanoseconds)


def from_stamp(stamp: Time) -> int:
    """Nanoseconds of a builtin_interfaces Time or Duration."""
    return int(stamp.sec) * NS_PER_S + int(stamp.nanosec)


def image_message(rgb: np.ndarray, stamp_ns: int, frame_id: str) -> Image:
    """sensor_msgs Image of uint8 [H, W, 3]."""
    message = Image(
        height=rgb.shape[0],
        width=rgb.shape[1],
        encoding='rgb8',
        is_bigendian=0,
        step=rgb.shape[1] * 3,
    )
    message.header.stamp = to_stamp(stamp_ns)
    message.header.frame_id = frame_id
    # Assigning bytes or a numpy array makes rclpy convert element by element.
    pixels = array.array('B')
    pixels.frombytes(np.ascontiguousarray(rgb).data.cast('B'))
    message.data = pixels
    return message


def joint_state_message(positions: dict[str, float], stamp_ns: int) -> JointState:
    """sensor_msgs JointState of positions by name (rad, m); velocity and effort stay empty."""
    message = JointState(name=list(positions), position=list(positions.values()))
    message.header.stamp = to_stamp(stamp_ns)
    return message


def trajectory_points(message: JointTrajectory) -> list[TrajectoryPoint]:
    """Points of a trajectory message as they are; the player judges them."""
    return [
        TrajectoryPoint(from_stamp(p.time_from_start), list(p.positions), list(p.velocities))
        for p in message.points
    ]
