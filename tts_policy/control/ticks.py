# SPDX-License-Identifier: Apache-2.0
"""When the policy ticks, on which window, and what starts a new episode.

Pure logic between the observation window and the policy: the live node, the replay of a recording
and the training windows all tick by it, so that the same messages give the same ticks. It is not
locked; whoever owns it guards it. Stamps are nanoseconds of the clock that stamped the messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tts_policy.control.observation import Arrival, ObservationWindow, WindowUnavailable

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class ScheduledTick:
    """One tick: its window, and whether an episode starts with it.

    reset: why an episode starts here, None where one goes on; episode: 0, 1, ... since `begin`;
    skipped: ticks that were due before and had no window.
    """

    stamp_ns: int
    observation: dict[str, np.ndarray]
    reset: str | None
    episode: int
    skipped: int


class TickSchedule:
    """Ticks by the stamps of the reference key, from its first full window on.

    `take` and `finish` are told the interval between ticks, which may change from one to the next.
    """

    def __init__(self, window: ObservationWindow) -> None:
        self.window = window
        self.waiting_for = ''
        self._due_ns: int | None = None
        self._reset: str | None = None
        self._episode = -1

    def begin(self, reason: str) -> None:
        """Start anew with an empty window; the next tick is the first of episode 0."""
        self.window.clear()
        self.waiting_for = ''
        self._reset = None
        self._episode = -1
        self.restart(reason, keep_rhythm=False)

    def restart(self, reason: str, keep_rhythm: bool) -> None:
        """Let the next tick start an episode; the first reason since the last tick counts."""
        if self._reset is None:
            self._reset = reason
        if not keep_rhythm:
            self._due_ns = None

    def store(self, key: str, stamp_ns: int, value: Any, now_ns: int) -> Arrival:
        """Put a message into the window; a break in its stamps starts an episode."""
        arrival = self.window.add(key, stamp_ns, value, now_ns)
        if arrival.breaks_continuity:
            self.restart(f'{key}: {arrival.value}', keep_rhythm=False)
        return arrival

    def advance(self, now_ns: int) -> bool:
        """Store what had to wait for the clock; whether that started an episode."""
        broken = [a for a in self.window.advance(now_ns) if a.breaks_continuity]
        for arrival in broken:
            self.restart(f'clock: {arrival.value}', keep_rhythm=False)
        return bool(broken)

    def take(self, now_ns: int, interval_ns: int) -> ScheduledTick | None:
        """Take the tick to make now, if its window is complete; `waiting_for` says why not."""
        stamp_ns = self.window.tick_stamp(self._due_ns, now_ns)
        if stamp_ns is None:
            return None
        try:
            observation = self.window.window(stamp_ns, now_ns)
        except WindowUnavailable as reason:
            self.waiting_for = str(reason)
            return None
        self.waiting_for = ''
        skipped = 0
        if self._due_ns is not None:
            skipped = max(0, round((stamp_ns - self._due_ns) / interval_ns))
        reset, self._reset = self._reset, None
        self._episode += reset is not None
        return ScheduledTick(stamp_ns, observation, reset, self._episode, skipped)

    def finish(self, tick: ScheduledTick, interval_ns: int) -> None:
        """Close a tick: the next one is due an interval after it."""
        self._due_ns = tick.stamp_ns + interval_ns
