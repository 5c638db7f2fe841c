# SPDX-License-Identifier: Apache-2.0
"""Numbers as ROS messages: times, trajectories, and the reuse plan of a tick as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from builtin_interfaces.msg import Duration, Time
from sensor_msgs.msg import Image
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from tts_policy.control.conversions import NS_PER_S
from tts_policy.policy.plan import plan_rgb

if TYPE_CHECKING:
    from tts_policy.control.trajectory import Trajectory
    from tts_policy.policy.plan import Plan

CELL_PIXELS = 12


def ns_to_time(stamp_ns: int) -> Time:
    """builtin_interfaces Time of a stamp in nanoseconds."""
    sec, nanosec = divmod(int(stamp_ns), NS_PER_S)
    return Time(sec=sec, nanosec=nanosec)


def ns_to_duration(duration_ns: int) -> Duration:
    """builtin_interfaces Duration of nanoseconds."""
    sec, nanosec = divmod(int(duration_ns), NS_PER_S)
    return Duration(sec=sec, nanosec=nanosec)


def trajectory_message(trajectory: Trajectory) -> JointTrajectory:
    """trajectory_msgs/JointTrajectory stamped with the time its points count from, if any."""
    msg = JointTrajectory()
    msg.header.stamp = ns_to_time(trajectory.stamp_ns)
    msg.joint_names = list(trajectory.joints)
    msg.points = [
        JointTrajectoryPoint(
            positions=positions.tolist(),
            velocities=velocities.tolist(),
            time_from_start=ns_to_duration(int(time_ns)),
        )
        for time_ns, positions, velocities in zip(
            trajectory.times_ns, trajectory.positions, trajectory.velocities, strict=True
        )
    ]
    return msg


def plan_image(plan: Plan, stamp_ns: int) -> Image:
    """rgb8 image of a plan int8 [K, N], a square per cell: COMPUTE, FORWARD, TIMESTEP, ROLLOUT."""
    pixels = plan_rgb(plan).repeat(CELL_PIXELS, axis=0).repeat(CELL_PIXELS, axis=1)
    # A dark line between cells keeps neighbours of the same class countable.
    pixels[CELL_PIXELS - 1 :: CELL_PIXELS] //= 2
    pixels[:, CELL_PIXELS - 1 :: CELL_PIXELS] //= 2
    height, width, _ = pixels.shape
    message = Image(
        height=height, width=width, encoding='rgb8', step=3 * width, data=pixels.tobytes()
    )
    message.header.stamp = ns_to_time(stamp_ns)
    return message
