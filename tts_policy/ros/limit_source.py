# SPDX-License-Identifier: Apache-2.0
"""Which limits are in force: those of the parameters, tightened by the URDF, scaled live."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tts_policy.ros.trajectory import TrajectoryRefused
from tts_policy.ros.urdf import parse_limits

if TYPE_CHECKING:
    from tts_policy.ros.limits import JointLimits

OFF, WHEN_PRESENT, REQUIRED = 'off', 'when_present', 'required'


class LimitSource:
    """Limits of the parameters and of the newest robot description.

    A description that cannot be used leaves no limits in force at all: then nothing is commanded.
    """

    def __init__(self, base: JointLimits, urdf: str) -> None:
        self.scale = 1.0
        self.missing: str | None = None
        self._base = self._limits = base
        if urdf == REQUIRED:
            self.missing = 'limits: expected a URDF on robot_description, got none yet'

    def describe(self, text: str) -> None:
        """Take a robot description; `missing` says what is wrong with it, if anything."""
        try:
            self._limits = self._base.tightened(parse_limits(text))
            self.missing = None
        except ValueError as error:
            self.missing = str(error)

    def current(self) -> JointLimits:
        """Limits of this moment.

        Raises
        ------
        TrajectoryRefused
            when there are none although there should be.

        """
        if self.missing is not None:
            raise TrajectoryRefused(self.missing)
        return self._limits.scaled(self.scale)
