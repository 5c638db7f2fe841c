# SPDX-License-Identifier: Apache-2.0
"""The only way from a chunk to the robot: timing, blending, limits and the hold point.

A command is sent only where the caller found the gate open. When it closes after a command, one
hold-position point follows. Calls come from the inference thread and from the executor; the owner
serialises them with `InferenceWorker.exclusive`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tts_policy.control.continuity import Continuity, blend, measure
from tts_policy.control.motion_watch import MotionWatch
from tts_policy.control.trajectory import (
    NotReady,
    Origin,
    Trajectory,
    due_times_ns,
    hold_trajectory,
    plan_trajectory,
)
from tts_policy.policy.contract import CommittedActions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tts_policy.control.limits import LimitSource


class TrajectorySink(Protocol):
    """Takes trajectories on their way to a controller.

    `following` is False while it is known that the newest one is not being followed.
    """

    @property
    def following(self) -> bool:
        """Whether the newest trajectory is in force, as far as is known."""

    def send(self, trajectory: Trajectory) -> None:
        """Let it replace the one before; raises TrajectoryRefused where nobody takes it."""

    def finish(self, trajectory: Trajectory) -> None:
        """Send the last one, and nothing after it."""

    def settle(self) -> None:
        """Wait a little until the last one was taken: what is destroyed now may never arrive."""


@dataclass(frozen=True)
class ChunkTiming:
    """Set-point a of a chunk is due at stamp + (a + offset_steps) * period_ns.

    Points due within `lead_ns` of publishing are dropped; fewer than `min_points` are not sent.
    """

    joints: tuple[str, ...]
    period_ns: int
    offset_steps: int
    lead_ns: int
    min_points: int


@dataclass(frozen=True)
class HoldRule:
    """How to hold: within `delay_ns`; `last_command` joints (a gripper) keep their set-point.

    A measured state older than `max_age_ns` is not used, neither for a hold nor for a chunk.
    States that stand still for `frozen_ns` of commanded motion are not true (0: not looked at).
    """

    delay_ns: int
    last_command: Sequence[str]
    max_age_ns: int
    frozen_ns: int = 0


@dataclass(frozen=True)
class Measured:
    """Measured positions [A] of the joints, by their stamp, and when they were received."""

    stamp_ns: int
    received_ns: int
    positions: np.ndarray

    def age_ns(self, now_ns: int) -> int:
        """How old they are at least: no stamp makes them newer than when they came."""
        return now_ns - min(self.stamp_ns, self.received_ns)


@dataclass(frozen=True)
class Sent:
    """A trajectory that was published, and how smoothly it took over."""

    trajectory: Trajectory
    continuity: Continuity


class CommandOutput:
    """Sends chunks as trajectories, to the robot or, gate closed, as proposals."""

    def __init__(
        self,
        timing: ChunkTiming,
        limits: LimitSource,
        hold_rule: HoldRule,
        command: TrajectorySink,
        proposed: TrajectorySink,
    ) -> None:
        self.blend_ns = 0
        self._limits = limits
        self._timing = timing
        self._hold_rule = hold_rule
        self._command = command
        self._proposed = proposed
        self._measured: Measured | None = None
        self._watch = MotionWatch(hold_rule.frozen_ns)
        # The newest trajectories sent to the robot, a hold included, and as a proposal.
        self._commanded: Trajectory | None = None
        self._proposal: Trajectory | None = None
        self._holding = True

    def begin(self) -> None:
        """Forget the measured state and the last command: nothing was commanded yet."""
        self._measured = self._commanded = self._proposal = None
        self._watch.begin()
        self._holding = True

    def measured(self, stamp_ns: int, positions: np.ndarray, now_ns: int) -> None:
        """Measured positions [A] of the joints; what comes out of order is passed over.

        The arm is held if they stand still although it was commanded to move.

        A stamp that is far older is that of a clock which was set back. Nothing is older than one
        that is ahead of the clock, `now_ns`: such a stamp is wrong.
        """
        if self._measured is not None and self._measured.stamp_ns <= now_ns:
            behind_ns = self._measured.stamp_ns - stamp_ns
            if 0 < behind_ns <= self._hold_rule.max_age_ns:
                return
        self._measured = Measured(stamp_ns, now_ns, positions)
        commanded = self._commanded
        moving = None if commanded is None or self._holding else commanded.position_at(now_ns)
        self._watch.look(positions, moving, now_ns)
        if self._watch.frozen is not None:
            self.hold(now_ns)

    def send(self, actions: np.ndarray, stamp_ns: int, now_ns: int, enabled: bool) -> Sent:
        """Publish the points of a chunk that are still to come.

        Where the gate was found closed here first, the hold point comes before the proposal.

        Raises
        ------
        TrajectoryRefused
            for a chunk that must not reach the robot; nothing is published then.

        """
        if not enabled:
            self.hold(now_ns)
        if stamp_ns > now_ns:
            raise NotReady(
                'chunk: expected an observation that is not ahead of the clock, '
                f'got one stamped {(stamp_ns - now_ns) * 1e-9:.3f} s ahead'
            )
        timing = self._timing
        trajectory = plan_trajectory(
            actions,
            timing.joints,
            timing.period_ns,
            timing.offset_steps,
            stamp_ns,
            now_ns,
            timing.lead_ns,
            timing.min_points,
        )
        measured = self._measured_at(now_ns)
        old = self._old(now_ns, enabled)
        old_at = None if old is None else old.positions_at
        if self.blend_ns > 0:
            start = old_at or (lambda due_ns: np.repeat(measured[None], len(due_ns), axis=0))
            trajectory = blend(trajectory, start, now_ns, self.blend_ns)
        limits = self._limits.current()
        origin = Origin.at_rest(now_ns - stamp_ns, measured)
        if old is not None:
            origin = Origin(now_ns - stamp_ns, old.position_at(now_ns), *old.state_at(now_ns))
        trajectory = limits.reachable(
            trajectory, origin.setpoints, now_ns, timing.min_points, at_rest=old is None
        )
        before = None if old is None else self._before(trajectory, old)
        trajectory = limits.apply(replace(trajectory, origin=origin), measured, before)
        continuity = measure(trajectory, old_at, timing.period_ns)
        if enabled:
            self._command.send(trajectory)
            self._commanded, self._proposal, self._holding = trajectory, None, False
        else:
            self._proposed.send(trajectory)
            self._proposal = trajectory
        return Sent(trajectory, continuity)

    def committed(
        self, stamp_ns: int, delay_ns: int, enabled: bool, soft: bool
    ) -> CommittedActions | None:
        """Set-points that are in force while a chunk is made of the observation of that stamp.

        Held are those that will be past when it is sent, `delay_ns` after the observation; soft:
        the rest of the old chunk too, ever less. None where nothing is in force.
        """
        last, timing = self._newest(stamp_ns, enabled), self._timing
        if last is None:
            return None
        first_ns, last_ns = (last.stamp_ns + int(time_ns) for time_ns in last.times_ns[[0, -1]])
        overlap = (last_ns - stamp_ns) // timing.period_ns - timing.offset_steps + 1
        if overlap < 1:
            return None
        due_ns = stamp_ns + due_times_ns(overlap, timing.offset_steps, timing.period_ns)
        held = int((due_ns <= stamp_ns + delay_ns + timing.lead_ns).sum())
        weights = hold_weights(held, overlap, soft)
        # What was in force before the old chunk's first point is not known any more.
        weights[due_ns < first_ns] = 0.0
        if not weights.any():
            return None
        return CommittedActions(last.positions_at(due_ns), weights)

    def hold(self, now_ns: int) -> bool:
        """Bring the joints to rest, once; False when nothing was commanded since the last hold.

        They come to rest where they were measured, as far as that is believed: recently, and
        within reach of the set-points in force. Otherwise the set-points in force are brought to
        rest. Limits that are missing at the moment do not keep the arm from stopping.

        The hold is on its way to all joints before any controller is waited for.
        """
        if self._commanded is None or self._holding:
            return False
        rule, joints = self._hold_rule, self._timing.joints
        position, velocity = self._commanded.state_at(now_ns)
        wanted = None
        if (
            self._measured is not None
            and self._measured.age_ns(now_ns) <= rule.max_age_ns
            and self._watch.frozen is None
        ):
            keep = [name in rule.last_command for name in joints]
            wanted = np.where(keep, np.nan, self._measured.positions)
        target, seconds = self._limits.known.stop(position, velocity, rule.delay_ns * 1e-9, wanted)
        hold = replace(
            hold_trajectory(joints, target, round(seconds * 1e9)),
            origin=Origin(0, self._commanded.position_at(now_ns), position, velocity),
        )
        self._command.finish(hold)
        self._commanded, self._holding = replace(hold, stamp_ns=now_ns), True
        self._command.settle()
        return True

    def _measured_at(self, now_ns: int) -> np.ndarray:
        """Measured positions [A]; raises NotReady where there are none, or old ones."""
        if self._measured is None:
            raise NotReady('chunk: expected a measured joint state, got none yet')
        if self._watch.frozen is not None:
            raise NotReady(self._watch.frozen)
        age_ns, limit_ns = self._measured.age_ns(now_ns), self._hold_rule.max_age_ns
        if age_ns > limit_ns:
            raise NotReady(
                f'chunk: expected a joint state of at most {limit_ns / 1e9:.3f} s, '
                f'got one of {age_ns / 1e9:.3f} s'
            )
        return self._measured.positions

    def _old(self, now_ns: int, enabled: bool) -> Trajectory | None:
        """Return the trajectory to be replaced; None where there is none of this kind."""
        last = self._newest(now_ns, enabled)
        # After its end the arm is at rest: the next chunk is a start, bounded by its distance.
        return None if last is None or now_ns > last.end_ns else last

    def _newest(self, now_ns: int, enabled: bool) -> Trajectory | None:
        """Return what was sent last; None where it was of the other kind or is not followed."""
        last = self._commanded if enabled else self._proposal
        if last is None or now_ns < last.stamp_ns:
            return None
        return last if not enabled or self._command.following else None

    def _before(self, trajectory: Trajectory, old: Trajectory) -> tuple[np.ndarray, np.ndarray]:
        """Set-points a period before the first point and, as far as known, two periods.

        The change of pace is judged by the period, also where the first point is due sooner.
        """
        times_ns = int(trajectory.times_ns[0]) - self._timing.period_ns * np.array([2, 1])
        due_ns = trajectory.stamp_ns + times_ns
        # What was in force before the old chunk's first point is not known any more.
        known = (due_ns >= old.stamp_ns + old.times_ns[0]) | np.array([False, True])
        return times_ns[known], old.positions_at(due_ns[known])


def hold_weights(held: int, overlap: int, soft: bool) -> np.ndarray:
    """Weights [overlap] that hold the first `held` actions fixed; with `soft` the rest decay.

    The decay is equation 5 of Real-Time Chunking (arXiv 2506.07339): c (e^c - 1) / (e - 1), where
    c falls linearly from the last held action to the end of the overlap.
    """
    weights = np.zeros(overlap)
    weights[:held] = 1.0
    if soft and overlap > held:
        c = np.arange(overlap - held, 0, -1) / (overlap - held + 1)
        weights[held:] = c * np.expm1(c) / np.expm1(1.0)
    return weights
