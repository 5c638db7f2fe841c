# SPDX-License-Identifier: Apache-2.0
"""A wish to stop that waits for the end of a step."""

from __future__ import annotations

import signal
from typing import Any


class StopRequest:
    """While it is entered, the first SIGINT asks to stop, and a second one interrupts as usual.

    A step that is interrupted has drawn random numbers and perhaps changed weights, so that no
    checkpoint made then continues as if nothing had been. To be entered by the main thread.
    """

    def __init__(self) -> None:
        self.made = False

    def __enter__(self) -> StopRequest:
        """Begin to listen; where SIGINT is ignored, it stays so."""
        self._previous: Any = signal.getsignal(signal.SIGINT)
        if callable(self._previous):
            signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        """Give SIGINT back to whom it belonged."""
        if callable(self._previous):
            signal.signal(signal.SIGINT, self._previous)

    def _ask(self, *_: object) -> None:
        self.made = True
        signal.signal(signal.SIGINT, self._previous)
