# SPDX-License-Identifier: Apache-2.0
"""Where one chunk takes over from another: blending over the overlap, and how smooth it is.

A new chunk was made from a newer observation and with luck continues the old one; it need not.
`blend` starts on the old set-points at the time of publishing and moves over to the new ones by a
smoothstep, so that position and velocity are continuous there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from tts_policy.control.trajectory import Trajectory


@dataclass(frozen=True)
class Continuity:
    """Largest values over the joints, in rad or m: at the take-over, and jerk along the points.

    jump: how far the first point lies from the old set-point of its time; velocity_jump per s:
    from the step into the first point to the step after it; jerk per s^3.
    """

    jump: float
    velocity_jump: float
    jerk: float


def blend(
    trajectory: Trajectory,
    old_at: Callable[[np.ndarray], np.ndarray],
    now_ns: int,
    duration_ns: int,
) -> Trajectory:
    """Lead from the old set-points over to the new ones within `duration_ns` of `now_ns`.

    old_at: times in ns [P] of the clock of the stamps -> old set-points [P, A].
    """
    due_ns = trajectory.stamp_ns + trajectory.times_ns
    share = np.clip((due_ns - now_ns) / duration_ns, 0.0, 1.0)
    weight = (share * share * (3.0 - 2.0 * share))[:, None]
    positions = weight * trajectory.positions + (1.0 - weight) * old_at(due_ns)
    start = old_at(np.array([now_ns]))
    times_s = np.concatenate([[now_ns - trajectory.stamp_ns], trajectory.times_ns]) * 1e-9
    velocities = np.gradient(np.concatenate([start, positions]), times_s, axis=0)[1:]
    # Where nothing was blended the chunk's own velocities are exact already.
    velocities = np.where(weight < 1.0, velocities, trajectory.velocities)
    velocities[-1] = 0.0
    return replace(trajectory, positions=positions, velocities=velocities)


def measure(
    trajectory: Trajectory, old_at: Callable[[np.ndarray], np.ndarray] | None, period_ns: int
) -> Continuity:
    """How smoothly a trajectory takes over; without an old one there is no jump."""
    period_s = period_ns * 1e-9
    positions = trajectory.positions
    jump = velocity_jump = 0.0
    if old_at is not None:
        first_ns = trajectory.stamp_ns + trajectory.times_ns[0]
        before, at = old_at(np.array([first_ns - period_ns, first_ns]))
        jump = float(np.abs(positions[0] - at).max())
        if len(positions) > 1:
            change = positions[1] - 2.0 * positions[0] + before
            velocity_jump = float(np.abs(change).max() / period_s)
        positions = np.concatenate([before[None], positions])
    jerk = 0.0
    if len(positions) > 3:
        jerk = float(np.abs(np.diff(positions, n=3, axis=0)).max() / period_s**3)
    return Continuity(jump, velocity_jump, jerk)
