# SPDX-License-Identifier: Apache-2.0
"""Which limits are in force: those of the parameters, tightened by the URDF, scaled live."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tts_policy.control.trajectory import TrajectoryRefused
from tts_policy.control.urdf import parse_limits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tts_policy.control.limits import JointLimits
    from tts_policy.control.urdf import UrdfLimits

OFF, REQUIRED = 'off', 'required'


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
