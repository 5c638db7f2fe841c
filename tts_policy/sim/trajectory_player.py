# SPDX-License-Identifier: Apache-2.0
"""Plays joint trajectories the way the stock joint trajectory controller does, without ROS.

Joints are mapped by name and every joint must be named. A trajectory that is accepted replaces
the old one at once: until its first point the set-point moves there from where it is; a first
point in the past therefore makes it jump; after the last point it holds. Between two points
interpolation is cubic where both have velocities, else linear; accelerations are not used.
A trajectory that is refused changes nothing. Times are integers in nanoseconds of one clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tts_policy.control.conversions import NS_PER_S

STOPPED_RAD_S = 1e-3


class TrajectoryError(ValueError):
    """A trajectory that cannot be played; the message says in one line why."""


@dataclass(frozen=True)
class TrajectoryPoint:
    """One point: time_from_start_ns >= 0, positions [J], velocities [J] or empty."""

    time_from_start_ns: int
    positions: Sequence[float]
    velocities: Sequence[float] = ()


@dataclass(frozen=True)
class _Knot:
    due_ns: int
    positions: NDArray[np.float64]
    velocities: NDArray[np.float64] | None


class TrajectoryPlayer:
    """The set-points of a fixed set of joints over time."""

    def __init__(self, joints: Sequence[str], start: Mapping[str, float]) -> None:
        """Hold `start`, which names every joint."""
        self.joints = tuple(joints)
        self.hold(start)

    def hold(self, positions: Mapping[str, float]) -> None:
        """Forget the trajectory and hold these positions from now on."""
        values = np.array([positions[name] for name in self.joints], np.float64)
        self._knots = [_Knot(0, values, np.zeros(len(values)))]

    def accept(
        self,
        joint_names: Sequence[str],
        points: Sequence[TrajectoryPoint],
        start_ns: int,
        now_ns: int,
    ) -> None:
        """Replace the trajectory; start_ns 0 means now.

        Raises
        ------
        TrajectoryError
            if names, lengths, times or values are wrong; the old trajectory goes on then.

        """
        order = self._order(joint_names)
        if not points:
            raise TrajectoryError('trajectory: expected at least one point, got none')
        start_ns = start_ns or now_ns
        knots = []
        for index, point in enumerate(points):
            knots.append(self._knot(index, point, order, start_ns))
            before_ns = points[index - 1].time_from_start_ns if index else -1
            if point.time_from_start_ns <= before_ns:
                raise TrajectoryError(
                    f'point {index}: expected a time_from_start above {before_ns} ns, '
                    f'got {point.time_from_start_ns} ns'
                )
        self._check_end(knots[-1], now_ns)
        if knots[0].due_ns > now_ns:
            knots.insert(0, self._sample(now_ns))
        self._knots = knots

    def set_points(self, now_ns: int) -> dict[str, float]:
        """Set-point of every joint at now_ns."""
        return dict(zip(self.joints, self._sample(now_ns).positions.tolist(), strict=True))

    def _order(self, names: Sequence[str]) -> list[int]:
        if sorted(names) != sorted(self.joints):
            raise TrajectoryError(
                f'joint_names: expected each of {list(self.joints)} once, got {list(names)}'
            )
        return [list(names).index(name) for name in self.joints]

    def _knot(self, index: int, point: TrajectoryPoint, order: list[int], start_ns: int) -> _Knot:
        if point.time_from_start_ns < 0:
            raise TrajectoryError(
                f'point {index}: expected a time_from_start of at least 0, '
                f'got {point.time_from_start_ns} ns'
            )
        positions = self._values(index, 'positions', point.positions)[order]
        velocities = None
        if len(point.velocities):
            velocities = self._values(index, 'velocities', point.velocities)[order]
        return _Knot(start_ns + point.time_from_start_ns, positions, velocities)

    def _values(self, index: int, what: str, values: Sequence[float]) -> NDArray[np.float64]:
        if len(values) != len(self.joints):
            raise TrajectoryError(
                f'point {index}: expected {len(self.joints)} {what}, got {len(values)}'
            )
        array = np.array(values, np.float64)
        if not np.isfinite(array).all():
            raise TrajectoryError(f'point {index}: expected finite {what}, got {array.tolist()}')
        return array

    def _check_end(self, last: _Knot, now_ns: int) -> None:
        if last.due_ns < now_ns:
            late_s = (now_ns - last.due_ns) / NS_PER_S
            raise TrajectoryError(
                f'trajectory: expected an end to come, got one {late_s:.3f} s ago'
            )
        if last.velocities is not None and np.abs(last.velocities).max() > STOPPED_RAD_S:
            raise TrajectoryError(
                'last point: expected zero velocities, because it is held, '
                f'got {last.velocities.tolist()}'
            )

    def _sample(self, now_ns: int) -> _Knot:
        """State of the set-point at now_ns; outside the knots it rests at the nearest."""
        knots = self._knots
        after = next((i for i, knot in enumerate(knots) if knot.due_ns > now_ns), len(knots))
        if after in (0, len(knots)):
            nearest = knots[0] if after == 0 else knots[-1]
            return _Knot(now_ns, nearest.positions, np.zeros_like(nearest.positions))
        return _between(knots[after - 1], knots[after], now_ns)


def _between(begin: _Knot, end: _Knot, now_ns: int) -> _Knot:
    duration_s = (end.due_ns - begin.due_ns) / NS_PER_S
    s = (now_ns - begin.due_ns) / (end.due_ns - begin.due_ns)
    if begin.velocities is None or end.velocities is None:
        step = end.positions - begin.positions
        return _Knot(now_ns, begin.positions + s * step, step / duration_s)
    p0, p1 = begin.positions, end.positions
    m0, m1 = begin.velocities * duration_s, end.velocities * duration_s
    a = 2 * (p0 - p1) + m0 + m1
    b = 3 * (p1 - p0) - 2 * m0 - m1
    positions = ((a * s + b) * s + m0) * s + p0
    return _Knot(now_ns, positions, ((3 * a * s + 2 * b) * s + m0) / duration_s)
