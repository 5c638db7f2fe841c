# SPDX-License-Identifier: Apache-2.0
"""Joint states that stand still although the arm was commanded to move.

A driver that died may go on publishing its last state under new stamps. Encoders are never that
still: while an arm moves, no two states are equal in every joint.
"""

from __future__ import annotations

import numpy as np

# Set-points that moved less than this, in rad or m, are no motion that an arm has to show.
LEAST_MOTION = 0.02


class MotionWatch:
    """Compares measured states with the set-points in force; `limit_ns` 0 switches it off.

    `frozen` says for how long the states stood still, until one differs or `begin` is called.
    """

    def __init__(self, limit_ns: int) -> None:
        self.limit_ns = limit_ns
        self.begin()

    def begin(self) -> None:
        """Forget everything."""
        self.frozen: str | None = None
        self._state: np.ndarray | None = None
        self._setpoint: np.ndarray | None = None
        self._moving_since_ns: int | None = None

    def look(self, state: np.ndarray, setpoint: np.ndarray | None, now_ns: int) -> None:
        """Take a measured state and the set-point [A] in force, None where none is."""
        if self._state is None or not np.array_equal(state, self._state):
            self.begin()
            self._state = state
        if setpoint is None or self._setpoint is None:
            self._setpoint, self._moving_since_ns = setpoint, None
            return
        if np.abs(setpoint - self._setpoint).max() <= LEAST_MOTION:
            return
        if self._moving_since_ns is None:
            self._moving_since_ns = now_ns
        still_ns = now_ns - self._moving_since_ns
        if self.limit_ns > 0 and still_ns >= self.limit_ns:
            self.frozen = (
                'joint_states: expected motion as commanded, got the same positions for '
                f'{still_ns * 1e-9:.2f} s'
            )
