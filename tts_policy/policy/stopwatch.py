# SPDX-License-Identifier: Apache-2.0
"""Host time of the stages of a tick."""

from __future__ import annotations

import time


class Stopwatch:
    """Host time of consecutive stages, in seconds."""

    def __init__(self) -> None:
        self.stages_s: dict[str, float] = {}
        self._started = self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """End a stage, which began when the stage before it ended."""
        now = time.perf_counter()
        self.stages_s[stage] = now - self._last
        self._last = now

    @property
    def total_s(self) -> float:
        """Time from the start to the end of the last stage."""
        return self._last - self._started
