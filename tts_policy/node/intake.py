# SPDX-License-Identifier: Apache-2.0
"""What the sensors of an active node bring: to the window, to the output, or into the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tts_policy.control.observation import Arrival

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from tts_policy.control.conversions import ConversionError
    from tts_policy.control.output import CommandOutput
    from tts_policy.node.monitor import Monitor
    from tts_policy.node.worker import InferenceWorker


class Intake:
    """The `SensorReceiver` of a configured node; refusals count while it is `active`."""

    def __init__(
        self,
        worker: InferenceWorker,
        output: CommandOutput,
        monitor: Monitor,
        now_ns: Callable[[], int],
        active: Callable[[], bool],
    ) -> None:
        self._worker = worker
        self._output = output
        self._monitor = monitor
        self._now_ns = now_ns
        self._active = active

    def on_sample(self, key: str, topic: str, stamp_ns: int, value: np.ndarray) -> None:
        """Store one sample."""
        arrival = self._worker.store(key, stamp_ns, value)
        if arrival in (Arrival.LATE, Arrival.FUTURE):
            ahead_s = (stamp_ns - self._now_ns()) * 1e-9
            text = f'{topic}: message is {arrival.value}, stamped {ahead_s:+.3f} s from now'
            self._monitor.warn(topic, text)

    def on_measured(self, stamp_ns: int, positions: np.ndarray) -> None:
        """Remember the measured state."""
        self._output.measured(stamp_ns, positions, self._now_ns())

    def on_refused(self, topic: str, error: ConversionError) -> None:
        """Report a message that does not fit."""
        if self._active():
            self._monitor.statistics.refused_messages[topic] += 1
            self._monitor.error(topic, f'message refused: {error}')
