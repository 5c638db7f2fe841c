# SPDX-License-Identifier: Apache-2.0
"""Time of the stages of a chunk on a GPU, from events of the main stream."""

from __future__ import annotations

import torch

from tts_policy.policy.stopwatch import Stopwatch


class DeviceStopwatch(Stopwatch):
    """Marks the stream at the end of every stage; nothing is waited for until `read`.

    What runs on a stream of its own, as the pruner does, shows only where the main stream waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self._marks: list[tuple[str, torch.cuda.Event]] = []
        self._mark('')

    def _mark(self, stage: str) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((stage, event))

    def lap(self, stage: str) -> None:
        """End a stage on the host and on the stream."""
        super().lap(stage)
        self._mark(stage)

    def read(self) -> dict[str, float]:
        """Seconds of every stage on the stream; waits for its end."""
        self._marks[-1][1].synchronize()
        return {
            stage: before.elapsed_time(after) * 1e-3
            for (_, before), (stage, after) in zip(self._marks, self._marks[1:], strict=False)
        }
