# SPDX-License-Identifier: Apache-2.0
"""From a chunk of set-points to a joint trajectory that a controller can follow safely.

Set-point a is due at observation stamp + (a + offset_steps) * period. Points due by now are
dropped (one due exactly now is past), so time_from_start is positive and strictly increasing and
no controller has to jump. A chunk that breaks a limit by more than its tolerance is refused whole;
within the tolerance its positions are clipped. Times are int nanoseconds, positions rad or m.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from tts_policy.ros.conversions import ns_to_duration, ns_to_time

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class TrajectoryRefused(ValueError):
    """A chunk that must not reach the robot; one line naming joint, limit and value."""


@dataclass(frozen=True)
class Trajectory:
    """Points of one chunk that are still to come.

    times_ns int64 [P] after `stamp_ns`, positions and velocities float64 [P, A]; `dropped` points
    were past.
    """

    joints: tuple[str, ...]
    stamp_ns: int
    times_ns: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray
    dropped: int

    def position_at(self, now_ns: int) -> np.ndarray:
        """Set-point [A] in force at `now_ns`: the last one due, the first before any is."""
        at = int(np.searchsorted(self.times_ns, now_ns - self.stamp_ns, side='right')) - 1
        return self.positions[max(at, 0)]


@dataclass(frozen=True)
class JointLimits:
    """Bounds per joint of the contract, [A] each; infinity where nothing is bounded.

    `tolerance` is the share of a bound's range by which it may be exceeded: of upper - lower for
    positions (which are then clipped), of the bound itself for velocities.
    """

    joints: tuple[str, ...]
    lower: np.ndarray
    upper: np.ndarray
    velocity: np.ndarray
    first_distance: np.ndarray
    tolerance: float = 0.0

    @staticmethod
    def unbounded(joints: Sequence[str]) -> JointLimits:
        """No bound on any joint: only NaN and infinity are refused."""
        inf = np.full(len(joints), np.inf)
        return JointLimits(tuple(joints), -inf, inf, inf, inf)

    def apply(self, trajectory: Trajectory, period_ns: int, measured: np.ndarray) -> Trajectory:
        """Check the points against every bound and clip positions within the tolerance.

        `measured` [A] is the newest measured state; the first point must lie within
        `first_distance` of it.

        Raises
        ------
        TrajectoryRefused
            for the first joint that breaks a bound beyond the tolerance.

        """
        positions = trajectory.positions
        span = self.upper - self.lower
        slack = np.where(np.isfinite(span), span, 0.0) * self.tolerance
        below, above = positions < self.lower - slack, positions > self.upper + slack
        self._refuse(
            below | above, positions, 'position', lambda j: f'[{self.lower[j]}, {self.upper[j]}]'
        )
        rates = np.diff(positions, axis=0) / (period_ns * 1e-9)
        self._refuse(
            np.abs(rates) > self.velocity * (1.0 + self.tolerance),
            rates,
            'velocity',
            lambda j: f'at most {self.velocity[j]}',
        )
        distance = positions[:1] - measured
        self._refuse(
            np.abs(distance) > self.first_distance,
            distance,
            'distance of the first point to the measured state',
            lambda j: f'at most {self.first_distance[j]}',
        )
        return replace(trajectory, positions=np.clip(positions, self.lower, self.upper))

    def _refuse(
        self, broken: np.ndarray, values: np.ndarray, quantity: str, bound: Callable[[int], str]
    ) -> None:
        if broken.any():
            point, joint = (int(i) for i in np.argwhere(broken)[0])
            raise TrajectoryRefused(
                f'{self.joints[joint]}: expected {quantity} {bound(joint)}, '
                f'got {values[point, joint]:.4f} at point {point}'
            )


def plan_trajectory(
    actions: np.ndarray,
    joints: Sequence[str],
    period_ns: int,
    offset_steps: int,
    stamp_ns: int,
    now_ns: int,
) -> Trajectory:
    """Time the set-points of a chunk and drop those already past.

    Parameters
    ----------
    actions
        float [usable, A], in robot units.
    joints
        the A joints of the contract, in the order of the columns.
    period_ns, offset_steps
        set-point a is due at stamp_ns + (a + offset_steps) * period_ns.
    stamp_ns
        stamp of the newest observation.
    now_ns
        time of publishing; earlier than the stamp counts as the stamp (a clock topic may lag).

    Returns
    -------
    Trajectory
        velocities are central differences over the whole chunk, one-sided at its start, and zero
        at its last point.

    Raises
    ------
    TrajectoryRefused
        for a wrong shape, NaN or infinity, or when every point is past.

    """
    actions = np.asarray(actions, dtype=np.float64)
    if actions.ndim != 2 or actions.shape[1] != len(joints) or len(actions) == 0:
        raise TrajectoryRefused(
            f'chunk: expected [usable, {len(joints)}] set-points, got shape {actions.shape}'
        )
    if not np.isfinite(actions).all():
        point, joint = (int(i) for i in np.argwhere(~np.isfinite(actions))[0])
        raise TrajectoryRefused(
            f'{joints[joint]}: expected finite set-points, got {actions[point, joint]} at action '
            f'{point}'
        )
    times_ns = (np.arange(len(actions), dtype=np.int64) + offset_steps) * period_ns
    first = int(np.searchsorted(times_ns, max(now_ns - stamp_ns, 0), side='right'))
    if first == len(actions):
        raise TrajectoryRefused(
            f'chunk: expected a set-point still to come, but the last was due '
            f'{(now_ns - stamp_ns - int(times_ns[-1])) / 1e6:.0f} ms ago'
        )
    velocities = np.zeros_like(actions)
    if len(actions) > 1:
        velocities[:-1] = np.gradient(actions, period_ns * 1e-9, axis=0)[:-1]
    return Trajectory(
        tuple(joints),
        stamp_ns,
        times_ns[first:],
        actions[first:].copy(),
        velocities[first:],
        first,
    )


def hold_trajectory(
    joints: Sequence[str], positions: np.ndarray, now_ns: int, delay_ns: int
) -> Trajectory:
    """One point at rest: be at `positions` [A] `delay_ns` from now and stay."""
    positions = np.asarray(positions, dtype=np.float64).reshape(1, -1)
    times_ns = np.array([delay_ns], dtype=np.int64)
    return Trajectory(tuple(joints), now_ns, times_ns, positions, np.zeros_like(positions), 0)


def trajectory_message(trajectory: Trajectory) -> JointTrajectory:
    """trajectory_msgs/JointTrajectory stamped with the time its points count from."""
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
