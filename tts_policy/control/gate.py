# SPDX-License-Identifier: Apache-2.0
"""The output gate: whether a command may leave the node, and what closed it.

    enable_output            the operator's switch, a live parameter; false is a dry run
    barred                   joints without limits, unless that is allowed explicitly
    emergency_stop: true     closes the gate at once, and keeps it closed
    emergency_stop: nothing  for longer than the timeout (a dead man's switch): the same

What an emergency stop closed is opened again by `reopen` alone, and not while the cause lasts.
The stop survives deactivate and cleanup: only the service, or a new process, forgets it. Pure
logic; times are seconds of a steady clock, which a simulation cannot stop.
"""

from __future__ import annotations

from typing import Any


class OutputGate:
    """Closed by a stop, by silence of the stop topic, or by the operator."""

    def __init__(self) -> None:
        self.enabled = False
        self.barred: str | None = None
        self.timeout_s = 0.0
        self.stops = 0
        self._stopped: str | None = None
        self._asserted = False
        self._heard_s: float | None = None

    def hear(self, stop: bool, now_s: float) -> None:
        """Take one message of the stop topic."""
        self.closed_by(now_s)  # a silence that ends now was one all the same
        self._heard_s = now_s
        self._asserted = stop
        if stop:
            self._close('emergency stop')

    def closed_by(self, now_s: float) -> str | None:
        """Why no command may leave, None when one may; notices a silence by itself."""
        silence = self._silence(now_s)
        if silence is not None and self._heard_s is not None:
            self._close(f'emergency_stop: {silence}')
        if self._stopped is not None:
            return f'{self._stopped}, opened again by ~/clear_stop only'
        if silence is not None:
            return f'emergency_stop: {silence}'
        return self.barred if self.enabled else 'output disabled'

    def listen_anew(self) -> None:
        """Forget when the topic was heard last, as nobody listened meanwhile.

        Closed until the next message, if there is a timeout; a stop stays one.
        """
        self._heard_s = None

    @property
    def stopped(self) -> str | None:
        """What stopped the output until the service is called, None where nothing did."""
        return self._stopped

    def values(self, now_s: float) -> dict[str, Any]:
        """Flat table for a report."""
        closed = self.closed_by(now_s)
        return {
            'output_enabled': closed is None,
            'output_closed_by': closed or '',
            'stops': self.stops,
        }

    def reopen(self, now_s: float) -> str | None:
        """Forget the stop; returns why that is refused, None when it was done."""
        if self._asserted:
            return 'expected emergency_stop to be false, it is still true'
        silence = self._silence(now_s)
        if silence is not None:
            return f'emergency_stop: {silence}'
        self._stopped = None
        return None

    def _close(self, reason: str) -> None:
        if self._stopped is None:
            self._stopped = reason
            self.stops += 1

    def _silence(self, now_s: float) -> str | None:
        if self.timeout_s <= 0.0:
            return None
        if self._heard_s is None:
            return 'nothing received yet, and a timeout is set'
        if now_s - self._heard_s > self.timeout_s:
            return f'nothing within {self.timeout_s:g} s'
        return None
