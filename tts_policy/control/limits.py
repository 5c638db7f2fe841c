# SPDX-License-Identifier: Apache-2.0
"""Bounds of the joints, and what every command has to keep: chunks and holds.

A chunk that breaks a bound by more than its tolerance is refused whole; within the tolerance its
positions are clipped. A controller's cubic runs through the velocities of the points too: they are
clipped as well, and reduced where the cubic would leave the position bounds between two points. A
hold is made so that it keeps the bounds, whatever the motion that it ends.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tts_policy.control.spline import Cubic, monotone_velocities
from tts_policy.control.trajectory import NotReady, Trajectory, TrajectoryRefused
from tts_policy.control.urdf import UrdfLimits, parse_limits

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

OFF, REQUIRED = 'off', 'required'
# Rounding, in rad or m.
_EPSILON = 1e-9
_BISECTIONS = 40


@dataclass(frozen=True)
class JointLimits:
    """Bounds per joint of the contract, [A] each; infinity where nothing is bounded.

    `tolerance` is the share of a bound's range by which it may be exceeded: of upper - lower for
    positions (which are then clipped), of the bound itself for velocities and accelerations.
    """

    joints: tuple[str, ...]
    lower: np.ndarray
    upper: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray
    first_distance: np.ndarray
    tolerance: float = 0.0

    @staticmethod
    def unbounded(joints: Sequence[str]) -> JointLimits:
        """No bound on any joint: only NaN and infinity are refused."""
        inf = np.full(len(joints), np.inf)
        return JointLimits(tuple(joints), -inf, inf, inf, inf, inf)

    def missing(self) -> str | None:
        """Which joints lack a bound on position or velocity, in words; None where none does."""
        parts = []
        for name, bounds in (
            ('position', self.upper - self.lower),
            ('velocity', self.velocity),
        ):
            joints = [j for j, bound in zip(self.joints, bounds, strict=True) if np.isinf(bound)]
            if joints:
                parts.append(f'{name} of {joints}')
        if not parts:
            return None
        return (
            'limits: expected bounds of position and velocity for every joint, '
            f'got none on {" and ".join(parts)}'
        )

    def scaled(self, scale: float) -> JointLimits:
        """Scale what bounds motion, not where the joints may be; `scale` is in (0, 1]."""
        return replace(
            self,
            velocity=self.velocity * scale,
            acceleration=self.acceleration * scale,
            first_distance=self.first_distance * scale,
        )

    def tightened(self, urdf: Mapping[str, UrdfLimits]) -> JointLimits:
        """Take the tighter of these bounds and those of a URDF, joint by joint.

        Raises
        ------
        ValueError
            when the two leave a joint no room.

        """
        lower, upper, velocity = self.lower.copy(), self.upper.copy(), self.velocity.copy()
        for at, joint in enumerate(self.joints):
            if joint in urdf:
                lower[at] = max(lower[at], urdf[joint].lower)
                upper[at] = min(upper[at], urdf[joint].upper)
                velocity[at] = min(velocity[at], urdf[joint].velocity)
                if not lower[at] < upper[at]:
                    raise ValueError(
                        f'robot_description: {joint}: expected room between the limits, '
                        f'got [{lower[at]}, {upper[at]}]'
                    )
        return replace(self, lower=lower, upper=upper, velocity=velocity)

    def apply(
        self,
        trajectory: Trajectory,
        measured: np.ndarray,
        before: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Trajectory:
        """Check the points against every bound and clip positions within the tolerance.

        `measured` [A] is the newest measured state; the first point must lie within
        `first_distance` of it. `before` are the last set-points in force before the first point,
        times in ns after the trajectory's stamp [P] and positions [P, A]: the step from there
        counts as well.

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
        self._check_motion(trajectory, before)
        distance = positions[:1] - measured
        self._refuse(
            np.abs(distance) > self.first_distance,
            distance,
            'distance of the first point to the measured state',
            lambda j: f'at most {self.first_distance[j]}',
        )
        clipped = np.clip(positions, self.lower, self.upper)
        velocities = np.clip(trajectory.velocities, -self.velocity, self.velocity)
        velocities = np.where(clipped == positions, velocities, 0.0)
        return self._inside(replace(trajectory, positions=clipped, velocities=velocities))

    def _inside(self, trajectory: Trajectory) -> Trajectory:
        """Reduce the velocities of joints whose cubic would leave the position bounds."""
        times_ns, positions, velocities = trajectory.knots()
        if len(positions) < 2:
            return trajectory
        seconds = np.diff(times_ns)[:, None] * 1e-9
        lower, upper = self._bounds_from(positions[0])

        def beyond(velocities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            low, high = Cubic(
                positions[:-1], velocities[:-1], positions[1:], velocities[1:], seconds
            ).extremes()
            return (low < lower - _EPSILON) | (high > upper + _EPSILON), np.where(
                low < lower, low, high
            )

        broken, _ = beyond(velocities)
        if broken.any():
            allowed = np.abs(monotone_velocities(positions, seconds))
            slower = np.clip(velocities[1:], -allowed, allowed)
            # Where the slope turns or the velocity points against it, only rest is safe.
            velocities = velocities.copy()
            velocities[1:] = np.where(broken.any(axis=0), slower, velocities[1:])
            broken, values = beyond(velocities)
            self._refuse(
                broken,
                values,
                'the path between points in',
                lambda j: f'[{self.lower[j]}, {self.upper[j]}]',
            )
        return replace(trajectory, velocities=velocities[-len(trajectory.velocities) :])

    def _bounds_from(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Position bounds of a way that begins at `position`, which may be outside already."""
        return np.minimum(self.lower, position), np.maximum(self.upper, position)

    def stop(
        self,
        position: np.ndarray,
        velocity: np.ndarray,
        delay_s: float,
        wanted: np.ndarray | None = None,
    ) -> tuple[np.ndarray, float]:
        """Where the joints come to rest, and after how many seconds: `delay_s` or more.

        position and velocity [A] are those in force. The joints decelerate evenly, within the
        bounds of acceleration and position. They come to rest at `wanted` [A] instead (NaN: no
        wish) if all of it can be reached within every bound.
        """
        with np.errstate(invalid='ignore'):
            seconds = max(delay_s, float(np.max(np.abs(velocity) / self.acceleration)))
        rest = np.zeros_like(velocity)
        lower, upper = self._bounds_from(position)
        way = velocity * seconds

        def inside(share: np.ndarray) -> np.ndarray:
            low, high = Cubic(position, velocity, position + share * way, rest, seconds).extremes()
            return (low >= lower - _EPSILON) & (high <= upper + _EPSILON)

        # Half of the way is even deceleration. Near a bound, brake harder first and come back.
        good, bad = np.full_like(velocity, 0.5), np.full_like(velocity, 0.5)
        with np.errstate(divide='ignore', invalid='ignore'):
            back = np.clip(0.6 * self.velocity / np.abs(velocity), 0.5, 100.0)
        good = np.where(inside(good), good, -np.nan_to_num(back, nan=0.5))
        for _ in range(_BISECTIONS):
            middle = (good + bad) / 2.0
            fits = inside(middle)
            good, bad = np.where(fits, middle, good), np.where(fits, bad, middle)
        target = np.clip(position + good * way, lower, upper)
        # What set out beyond a bound comes back, if it can be done within the others.
        wishes = [np.clip(target, self.lower, self.upper)]
        if wanted is not None:
            wishes.insert(0, np.where(np.isnan(wanted), wishes[0], wanted))
        for wish in wishes:
            if self._reaches(Cubic(position, velocity, wish, rest, seconds)):
                return wish, seconds
        return target, seconds

    def _reaches(self, cubic: Cubic) -> bool:
        """Whether a way to rest keeps every bound, that of the distance included."""
        scale = 1.0 + self.tolerance
        lower, upper = self._bounds_from(cubic.p0)
        (low, high), (speed, change) = cubic.extremes(), cubic.peaks()
        kept = (
            (np.abs(cubic.p1 - cubic.p0) <= self.first_distance)
            & (low >= lower - _EPSILON)
            & (high <= upper + _EPSILON)
            & (speed <= self.velocity * scale)
            & (change <= self.acceleration * scale)
        )
        return bool(kept.all())

    def reachable(
        self,
        trajectory: Trajectory,
        start: np.ndarray,
        now_ns: int,
        min_points: int,
        at_rest: bool,
    ) -> Trajectory:
        """Drop the first points that cannot be reached at what is allowed.

        The joints are at `start` [A]; the way to the first point left lasts from `now_ns` until
        that point is due, and from rest takes half of that time squared times the acceleration.

        Raises
        ------
        TrajectoryRefused
            when fewer than `min_points` would be left.

        """
        left_s = (trajectory.stamp_ns + trajectory.times_ns - now_ns)[:, None] * 1e-9
        rates = (trajectory.positions - start) / left_s
        changes = 2.0 * rates / left_s
        scale = 1.0 + self.tolerance
        fast = np.abs(rates) > self.velocity * scale
        hard = (np.abs(changes) > self.acceleration * scale) & at_rest
        starts = ~(fast | hard).any(axis=1)[: max(1, len(rates) - min_points + 1)]
        if not starts.any():
            self._refuse(fast, rates, 'velocity', lambda j: f'at most {self.velocity[j]}')
            self._refuse(
                hard, changes, 'acceleration', lambda j: f'at most {self.acceleration[j]}'
            )
        return trajectory.after(int(np.argmax(starts)))

    def _check_motion(
        self, trajectory: Trajectory, before: tuple[np.ndarray, np.ndarray] | None
    ) -> None:
        positions, times_s = trajectory.positions, trajectory.times_ns * 1e-9
        if before is not None:
            positions = np.concatenate([before[1], positions])
            times_s = np.concatenate([before[0] * 1e-9, times_s])
        if len(positions) < 2:
            return
        steps_s = np.diff(times_s)[:, None]
        rates = np.diff(positions, axis=0) / steps_s
        scale = 1.0 + self.tolerance
        self._refuse(
            np.abs(rates) > self.velocity * scale,
            rates,
            'velocity',
            lambda j: f'at most {self.velocity[j]}',
        )
        changes = np.diff(rates, axis=0) / ((steps_s[:-1] + steps_s[1:]) / 2)
        self._refuse(
            np.abs(changes) > self.acceleration * scale,
            changes,
            'acceleration',
            lambda j: f'at most {self.acceleration[j]}',
        )

    def _refuse(
        self, broken: np.ndarray, values: np.ndarray, quantity: str, bound: Callable[[int], str]
    ) -> None:
        if broken.any():
            point, joint = (int(i) for i in np.argwhere(broken)[0])
            raise TrajectoryRefused(
                f'{self.joints[joint]}: expected {quantity} {bound(joint)}, '
                f'got {values[point, joint]:.4f} at point {point}'
            )


class LimitSource:
    """Limits of the parameters and of the robot descriptions, the newest of every joint.

    A description that cannot be used leaves no limits in force at all: then nothing is commanded,
    until a sound one comes. Where one is required every joint has to be named but those of a
    `gripper`, which has a description of its own at times.
    """

    def __init__(self, base: JointLimits, urdf: str, gripper: Sequence[str] = ()) -> None:
        self.scale = 1.0
        self.missing: str | None = None
        self.unnamed: list[str] = []
        self._base = self._limits = base
        self._urdf: dict[str, UrdfLimits] = {}
        self._arm = [joint for joint in base.joints if joint not in gripper]
        self._required = urdf == REQUIRED
        if self._required:
            self.missing = 'limits: expected a URDF on robot_description, got none yet'

    def describe(self, text: str) -> None:
        """Take a robot description; `missing` says what is wrong with it, if anything."""
        try:
            # What a description does not name keeps the bounds that another one gave it.
            urdf = self._urdf | parse_limits(text)
            self._limits, self._urdf = self._base.tightened(urdf), urdf
        except ValueError as error:
            self.missing = str(error)
            return
        self.unnamed = [joint for joint in self._arm if joint not in urdf]
        self.missing = None
        if self._required and self.unnamed:
            self.missing = (
                f'robot_description: expected the joints {self._arm}, missing {self.unnamed}'
            )

    def unbounded(self) -> str | None:
        """Which joints nothing bounds by now, in words; None where all are."""
        return self._limits.missing()

    @property
    def known(self) -> JointLimits:
        """The newest limits that could be used, unscaled: what a hold has to keep in any case."""
        return self._limits

    def current(self) -> JointLimits:
        """Limits of this moment.

        Raises
        ------
        NotReady
            when there are none although there should be.

        """
        if self.missing is not None:
            raise NotReady(self.missing)
        return self._limits.scaled(self.scale)
