# SPDX-License-Identifier: Apache-2.0
"""From a chunk of set-points to a joint trajectory that a controller can follow safely.

Set-point a is due at observation stamp + (a + offset_steps) * period. Points due by now, or before
a message can be at the controller, are dropped (one due exactly then is past), so time_from_start
is positive and strictly increasing and no controller has to jump. Times are int nanoseconds,
positions rad or m.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tts_policy.control.spline import Cubic

if TYPE_CHECKING:
    from collections.abc import Sequence


# A controller lets a trajectory without a stamp begin when it comes, however late that is.
NO_STAMP = 0


class TrajectoryRefused(ValueError):
    """A chunk that must not reach the robot; one line naming joint, limit and value."""


class ChunkTooLate(TrajectoryRefused):
    """Too few points of a chunk are still to come: the robot finishes the old one and stops."""


class NotReady(TrajectoryRefused):
    """Something but the chunk is missing: limits, a measured state, a controller."""


@dataclass(frozen=True)
class Origin:
    """Where the joints set out for the first point of a trajectory, `time_ns` after its stamp.

    setpoints [A] lie on straight lines between points, as set-points are blended and streamed;
    positions and velocities [A] on the cubic that a controller runs.
    """

    time_ns: int
    setpoints: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray

    @staticmethod
    def at_rest(time_ns: int, positions: np.ndarray) -> Origin:
        """Set out from rest."""
        return Origin(time_ns, positions, positions, np.zeros_like(positions))


@dataclass(frozen=True)
class Trajectory:
    """Points of one chunk that are still to come.

    times_ns int64 [P] after `stamp_ns`, positions and velocities float64 [P, A]; `dropped` points
    were past. `origin` is known once the trajectory is on its way.
    """

    joints: tuple[str, ...]
    stamp_ns: int
    times_ns: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray
    dropped: int
    origin: Origin | None = None

    @property
    def end_ns(self) -> int:
        """When the last point is due, of the stamp's clock; the joints rest from then on."""
        return self.stamp_ns + int(self.times_ns[-1])

    def positions_at(self, due_ns: np.ndarray) -> np.ndarray:
        """Set-points [P, A] at times [P] of the stamp's clock: linear from the origin on.

        Before that, or where none is known before the first point, and after the last they rest.
        """
        known_ns, known = self.times_ns, self.positions
        if self.origin is not None:
            known_ns = np.concatenate([[self.origin.time_ns], known_ns])
            known = np.concatenate([self.origin.setpoints[None], known])
        times_ns = np.asarray(due_ns) - self.stamp_ns
        return np.stack([np.interp(times_ns, known_ns, column) for column in known.T], axis=1)

    def knots(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Times in ns, positions and velocities of the origin, if any, and of every point."""
        if self.origin is None:
            return self.times_ns, self.positions, self.velocities
        return (
            np.concatenate([[self.origin.time_ns], self.times_ns]),
            np.concatenate([self.origin.positions[None], self.positions]),
            np.concatenate([self.origin.velocities[None], self.velocities]),
        )

    def state_at(self, now_ns: int) -> tuple[np.ndarray, np.ndarray]:
        """Position and velocity [A] on the controller's cubic; at rest before and after it."""
        times_ns, positions, velocities = self.knots()
        at_ns = now_ns - self.stamp_ns
        after = int(np.searchsorted(times_ns, at_ns, side='right'))
        if after == 0 or at_ns >= times_ns[-1]:
            position = positions[0 if after == 0 else -1]
            return position, np.zeros_like(position)
        begin_ns, end_ns = (int(time_ns) for time_ns in times_ns[after - 1 : after + 1])
        cubic = Cubic(
            positions[after - 1],
            velocities[after - 1],
            positions[after],
            velocities[after],
            (end_ns - begin_ns) * 1e-9,
        )
        return cubic.state((at_ns - begin_ns) / (end_ns - begin_ns))

    def position_at(self, now_ns: int) -> np.ndarray:
        """Set-points [A] at one time, see `positions_at`."""
        return self.positions_at(np.array([now_ns]))[0]

    def after(self, points: int) -> Trajectory:
        """What is left without the first so many points."""
        return replace(
            self,
            times_ns=self.times_ns[points:],
            positions=self.positions[points:],
            velocities=self.velocities[points:],
            dropped=self.dropped + points,
        )

    def of(self, joints: Sequence[str]) -> Trajectory:
        """The same points for some of the joints, in their order."""
        columns = [self.joints.index(joint) for joint in joints]
        origin = self.origin
        if origin is not None:
            states = (origin.setpoints, origin.positions, origin.velocities)
            origin = Origin(origin.time_ns, *(state[columns] for state in states))
        return replace(
            self,
            joints=tuple(joints),
            positions=self.positions[:, columns],
            velocities=self.velocities[:, columns],
            origin=origin,
        )


def plan_trajectory(
    actions: np.ndarray,
    joints: Sequence[str],
    period_ns: int,
    offset_steps: int,
    stamp_ns: int,
    now_ns: int,
    lead_ns: int = 0,
    min_points: int = 1,
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
    lead_ns
        how long a message takes to the controller: a point due sooner is past when it arrives.
    min_points
        fewer points than this are not worth a new trajectory.

    Returns
    -------
    Trajectory
        velocities are central differences over the whole chunk, one-sided at its start, and zero
        at its last point.

    Raises
    ------
    TrajectoryRefused
        for a wrong shape, NaN or infinity.
    ChunkTooLate
        when fewer than `min_points` are still to come.

    """
    actions = _checked(actions, joints)
    times_ns = due_times_ns(len(actions), offset_steps, period_ns)
    first = _first_in_time(times_ns, max(now_ns - stamp_ns, 0), lead_ns, min_points)
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


def due_times_ns(count: int, offset_steps: int, period_ns: int) -> np.ndarray:
    """When the first `count` actions are due, ns after the observation: int64 [count]."""
    return (np.arange(count, dtype=np.int64) + offset_steps) * period_ns


def _checked(actions: np.ndarray, joints: Sequence[str]) -> np.ndarray:
    """Set-points float64 [usable, A]; TrajectoryRefused for another shape, NaN or infinity."""
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
    return actions


def _first_in_time(times_ns: np.ndarray, age_ns: int, lead_ns: int, min_points: int) -> int:
    """Index of the first point due later than `lead_ns` from now; ChunkTooLate if too few are."""
    first = int(np.searchsorted(times_ns, age_ns + lead_ns, side='right'))
    left = len(times_ns) - first
    if left < min_points:
        ahead_ms = (int(times_ns[-1]) - age_ns) / 1e6
        last = f'is due in {ahead_ms:.0f} ms' if left else f'was due {abs(ahead_ms):.0f} ms ago'
        raise ChunkTooLate(
            f'chunk: expected {min_points} set-points or more still to come, got {left}: '
            f'the last {last}'
        )
    return first


def hold_trajectory(joints: Sequence[str], positions: np.ndarray, delay_ns: int) -> Trajectory:
    """One point at rest: be at `positions` [A] `delay_ns` after it has come, and stay.

    It has no stamp: a controller refuses a trajectory that has ended by its stamp, and a stop must
    not expire on the way, or between two clocks.
    """
    positions = np.asarray(positions, dtype=np.float64).reshape(1, -1)
    times_ns = np.array([delay_ns], dtype=np.int64)
    return Trajectory(tuple(joints), NO_STAMP, times_ns, positions, np.zeros_like(positions), 0)
