# SPDX-License-Identifier: Apache-2.0
"""The cubic that a controller runs between two points: where it is, and how far it swings out.

A point has a position and a velocity; both are met at its time. With s from 0 to 1 the position is
p0 + m0 s + b s^2 + c s^3, where m0 and m1 are the velocities times the duration, d = p1 - p0,
b = 3 d - 2 m0 - m1 and c = m0 + m1 - 2 d. All functions work element by element.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Cubic:
    """From position and velocity (p0, v0) to (p1, v1) within `seconds`; arrays that broadcast."""

    p0: np.ndarray
    v0: np.ndarray
    p1: np.ndarray
    v1: np.ndarray
    seconds: np.ndarray | float

    @property
    def _coefficients(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        m0, m1 = self.v0 * self.seconds, self.v1 * self.seconds
        d = self.p1 - self.p0
        return m0, 3.0 * d - 2.0 * m0 - m1, m0 + m1 - 2.0 * d

    def state(self, share: float) -> tuple[np.ndarray, np.ndarray]:
        """Position and velocity after a share of the time."""
        m0, b, c = self._coefficients
        position = self.p0 + share * (m0 + share * (b + share * c))
        return position, (m0 + share * (2.0 * b + share * 3.0 * c)) / self.seconds

    def extremes(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest position on the way."""
        m0, b, c = self._coefficients
        with np.errstate(all='ignore'):
            # Both roots of the derivative, without cancellation.
            q = -(b + np.copysign(np.sqrt(np.maximum(b * b - 3.0 * c * m0, 0.0)), b))
            roots = [np.clip(np.nan_to_num(s), 0.0, 1.0) for s in (q / (3.0 * c), m0 / q)]
        turns = [self.p0 + s * (m0 + s * (b + s * c)) for s in roots]
        values = np.stack(np.broadcast_arrays(self.p0, self.p1, *turns))
        return values.min(axis=0), values.max(axis=0)

    def peaks(self) -> tuple[np.ndarray, np.ndarray]:
        """Highest speed and highest acceleration on the way."""
        m0, b, c = self._coefficients
        with np.errstate(all='ignore'):
            turn = np.clip(np.nan_to_num(-b / (3.0 * c)), 0.0, 1.0)
        shares = (np.zeros_like(turn), turn, np.ones_like(turn))
        rates = np.stack([np.abs(m0 + s * (2.0 * b + s * 3.0 * c)) for s in shares])
        changes = np.maximum(np.abs(2.0 * b), np.abs(2.0 * b + 6.0 * c))
        return rates.max(axis=0) / self.seconds, changes / np.square(self.seconds)


def monotone_velocities(positions: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Largest velocities [P - 1, A] of all points but the first with which nothing swings out.

    positions [P, A], seconds [P - 1, 1] between them. A cubic whose velocities have the sign of
    its slope and at most three times its size is monotone (Fritsch and Carlson 1980).
    """
    slopes = np.diff(positions, axis=0) / seconds
    allowed = 3.0 * np.minimum(np.abs(slopes[:-1]), np.abs(slopes[1:]))
    allowed = np.where(slopes[:-1] * slopes[1:] > 0.0, allowed * np.sign(slopes[1:]), 0.0)
    return np.concatenate([allowed, np.zeros_like(positions[:1])])
