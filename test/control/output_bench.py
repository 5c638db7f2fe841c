# SPDX-License-Identifier: Apache-2.0
"""A command output on a bench: recorders for sinks, a chunk to send, and a measured state."""

from __future__ import annotations

from typing import Any

import numpy as np

from tts_policy.control.limits import JointLimits, LimitSource
from tts_policy.control.output import ChunkTiming, CommandOutput, HoldRule
from tts_policy.control.trajectory import Trajectory

JOINTS = ('a', 'b', 'grip')
PERIOD = 50_000_000
T0 = 1_700_000_000_000_000_000
RAMP = np.stack([np.arange(15) * 0.01, np.arange(15) * -0.02, np.full(15, 0.04)], axis=1)
REST = np.array([-0.01, 0.02, 0.04])


class Recorder:
    """Keeps what it is sent."""

    following = True

    def __init__(self) -> None:
        self.sent: list[Trajectory] = []
        self.finished: list[Trajectory] = []

    def send(self, trajectory: Trajectory) -> None:
        self.sent.append(trajectory)

    def finish(self, trajectory: Trajectory) -> None:
        self.finished.append(trajectory)

    def settle(self) -> None:
        pass


class Bench:
    """An output with two recorders, and a measured state."""

    def __init__(
        self,
        velocity: float = np.inf,
        min_points: int = 1,
        acceleration: float = np.inf,
        command: Any = None,
        hold_ns: int = 100,
        upper: float = np.inf,
        frozen_ns: int = 0,
    ) -> None:
        self.command, self.proposed = Recorder(), Recorder()
        base = JointLimits.unbounded(JOINTS)
        limits = JointLimits(
            JOINTS,
            base.lower,
            np.full(3, upper),
            np.full(3, velocity),
            np.full(3, acceleration),
            base.upper,
        )
        self.output = CommandOutput(
            ChunkTiming(JOINTS, PERIOD, 1, 0, min_points),
            LimitSource(limits, 'off'),
            HoldRule(hold_ns, ('grip',), 250_000_000, frozen_ns),
            command or self.command,
            self.proposed,
        )
        self.output.measured(T0, REST, T0)
