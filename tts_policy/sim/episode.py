# SPDX-License-Identifier: Apache-2.0
"""One episode of the simulated robot: its timeline, its controller and how it ends, without ROS.

Time is an integer number of nanoseconds that starts at `start_ns` and advances by one control
period per `step`; nothing else moves it. Camera frames are due every FRAME_NS from the start, and
ticks, the stamps at which a policy owes an action, at start + FRAME_NS + k * action period: the
first two frames are at rest. The episode ends with success or at its time limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tts_policy.sim.panda import COMMAND_JOINTS, FRAME_NS, STEP_NS
from tts_policy.sim.trajectory_player import TrajectoryPlayer, TrajectoryPoint

SUCCESS = 'success'
TIME_LIMIT = 'time limit'


@dataclass(frozen=True)
class Timeline:
    """When ticks are due and when an episode ends, both in whole multiples of the frame period."""

    action_period_ns: int = 8 * FRAME_NS
    limit_ns: int = 120 * FRAME_NS

    def __post_init__(self) -> None:
        """Raise ValueError for a period that no camera stamp could meet."""
        for what in ('action_period_ns', 'limit_ns'):
            value = getattr(self, what)
            if value <= 0 or value % FRAME_NS:
                raise ValueError(
                    f'{what}: expected a positive multiple of the frame period, {FRAME_NS} ns, '
                    f'got {value} ns'
                )

    @classmethod
    def from_seconds(cls, action_period_s: float, limit_s: float) -> Timeline:
        """Timeline of periods in seconds; they must be multiples of 0.05 s to a microsecond."""
        return cls(*(round(s * 1e6) * 1000 for s in (action_period_s, limit_s)))


class Robot(Protocol):
    """What an episode needs of a simulated robot; `World` is one."""

    def reset(self, seed: int, start_jitter_rad: float = 0.0) -> None: ...

    def step(self, set_points: Mapping[str, float]) -> None: ...

    def joint_positions(self) -> dict[str, float]: ...

    def success(self) -> bool: ...

    def render(self) -> NDArray[np.uint8]: ...


class Episode:
    """Resets the world at construction and drives it until `ended` tells how it ended."""

    def __init__(self, world: Robot, seed: int, start_ns: int, timeline: Timeline) -> None:
        """Put the world into the state of `seed` at time start_ns, the arm held at home."""
        self.seed = seed
        self.start_ns = start_ns
        self.now_ns = start_ns
        self.ended: str | None = None
        self._world = world
        self._timeline = timeline
        world.reset(seed)
        self._player = TrajectoryPlayer(COMMAND_JOINTS, world.joint_positions())

    @property
    def elapsed_ns(self) -> int:
        """Simulated time since the start of the episode."""
        return self.now_ns - self.start_ns

    @property
    def success(self) -> bool:
        """Whether the episode ended with the task done."""
        return self.ended == SUCCESS

    @property
    def frame_due(self) -> bool:
        """Whether the camera takes a picture at now_ns."""
        return self.elapsed_ns % FRAME_NS == 0

    @property
    def tick_due(self) -> bool:
        """Whether a policy owes an action for the observation of now_ns."""
        since_first = self.elapsed_ns - FRAME_NS
        return since_first >= 0 and since_first % self._timeline.action_period_ns == 0

    def seen_at_tick(self, frames: int) -> bool:
        """Whether the camera frame of now_ns is one of the last `frames` of some tick's window."""
        until_tick_ns = (FRAME_NS - self.elapsed_ns) % self._timeline.action_period_ns
        return self.frame_due and until_tick_ns < frames * FRAME_NS

    def accept(
        self, joint_names: Sequence[str], points: Sequence[TrajectoryPoint], start_ns: int
    ) -> None:
        """Follow a new trajectory from now_ns on; raises TrajectoryError and changes nothing."""
        self._player.accept(joint_names, points, start_ns, self.now_ns)

    def step(self) -> None:
        """Advance one control period towards the set-point that is due at its end."""
        if self.ended is not None:
            raise RuntimeError(f'episode of seed {self.seed} has ended: {self.ended}')
        self.now_ns += STEP_NS
        self._world.step(self._player.set_points(self.now_ns))
        if self._world.success():
            self.ended = SUCCESS
        elif self.elapsed_ns >= self._timeline.limit_ns:
            self.ended = TIME_LIMIT

    def abandon(self, reason: str) -> None:
        """End the episode as failed."""
        if self.ended is None:
            self.ended = reason
