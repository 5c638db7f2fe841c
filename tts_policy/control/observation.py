# SPDX-License-Identifier: Apache-2.0
"""The observation window: time-stamped samples per key, and the stacked window of one tick.

Pure logic, the same for the live node and for recorded data. Nothing is ever padded or made up: a
window exists only when every sample of every key is there. All times are int nanoseconds of the
clock that stamped the messages. The object is not locked; whoever owns it guards it.

What happens to a message (`ObservationWindow.add`):

==============  ===================================================================================
STORED          newer than all of its key
DUPLICATE       its stamp is held already: the first one stays (a frozen camera goes stale so)
REORDERED       older than the newest but of use still: put in its place
LATE            older than any window could use: dropped
FUTURE          stamped more than `future_limit_ns` after now: put aside until the clock is there,
                or until a message of the present shows that the stamp was wrong
GAP             more than `gap_limit_ns` after the newest of its key: the key starts anew with it
BACKWARD        more than `gap_limit_ns` before the newest: the same
==============  ===================================================================================

After GAP and BACKWARD the caller must reset the policy: what it remembers is of another past.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, deque
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tts_policy.policy.contract import ObservationSpec

# Future-stamped messages put aside per key; more than this are not worth waiting for.
_PENDING = 8
_Pending = tuple[int, Any]


class Arrival(Enum):
    """What became of a message; the module's table defines each."""

    STORED = 'stored'
    DUPLICATE = 'duplicate'
    REORDERED = 'reordered'
    LATE = 'late'
    FUTURE = 'future'
    GAP = 'gap'
    BACKWARD = 'backward'

    @property
    def breaks_continuity(self) -> bool:
        """Whether the policy must be reset."""
        return self in (Arrival.GAP, Arrival.BACKWARD)


class WindowUnavailable(LookupError):
    """There is no window at the stamp asked for; the message says which key lacks what."""


@dataclass(frozen=True)
class WindowSpec:
    """Shape and limits of a window; times in nanoseconds.

    `keys[0]` is the reference: its stamps are the ticks. `tolerance_ns` bounds the distance of a
    sample from the time it stands for, `max_skew_ns` that of the samples of one step, of cameras
    and joints, from each other.
    """

    keys: tuple[str, ...]
    steps: int
    period_ns: int
    tolerance_ns: int
    max_age_ns: int
    gap_limit_ns: int
    future_limit_ns: int
    capacity: int = 1024
    max_skew_ns: int | None = None

    @staticmethod
    def of(
        observation: ObservationSpec,
        tolerance_ns: int = 0,
        max_age_ns: int = 250_000_000,
        gap_limit_ns: int = 500_000_000,
        future_limit_ns: int = 100_000_000,
        max_skew_ns: int = 0,
    ) -> WindowSpec:
        """Window of a contract; its first camera is the reference, joints without one.

        Defaults are the node's; tolerance_ns 0 takes half a period, max_skew_ns 0 sets no bound.
        """
        period_ns = round(observation.period_s * 1e9)
        return WindowSpec(
            keys=(*(camera.key for camera in observation.cameras), 'joints'),
            steps=observation.steps,
            period_ns=period_ns,
            tolerance_ns=tolerance_ns or period_ns // 2,
            max_age_ns=max_age_ns,
            gap_limit_ns=gap_limit_ns,
            future_limit_ns=future_limit_ns,
            max_skew_ns=max_skew_ns or None,
        )

    @property
    def span_ns(self) -> int:
        """How far back a key is kept: the window, and the delay one key may have on another."""
        return self.steps * self.period_ns + self.tolerance_ns + self.max_age_ns


class _Buffer:
    """Samples of one key, sorted by stamp."""

    def __init__(self) -> None:
        self.stamps: list[int] = []
        self.values: list[Any] = []
        self.pending: deque[_Pending] = deque(maxlen=_PENDING)

    @property
    def newest(self) -> int | None:
        return self.stamps[-1] if self.stamps else None

    def clear(self) -> None:
        self.stamps.clear()
        self.values.clear()

    def insert(self, at: int, stamp_ns: int, value: Any) -> None:
        self.stamps.insert(at, stamp_ns)
        self.values.insert(at, value)

    def trim(self, oldest_ns: int, capacity: int) -> None:
        drop = max(bisect_left(self.stamps, oldest_ns), len(self.stamps) - capacity)
        if drop > 0:
            del self.stamps[:drop]
            del self.values[:drop]

    def split_pending(self, limit_ns: int) -> tuple[list[_Pending], list[_Pending]]:
        """What was put aside until `limit_ns`, and for later."""
        until = [sample for sample in self.pending if sample[0] <= limit_ns]
        return until, [sample for sample in self.pending if sample[0] > limit_ns]

    def put_aside(self, samples: list[_Pending]) -> None:
        """Let these be all that is put aside."""
        self.pending.clear()
        self.pending.extend(samples)

    def nearest(self, target_ns: int, no_later_than_ns: int) -> int | None:
        """Index of the sample nearest to the target, the older of two; None when empty."""
        end = bisect_right(self.stamps, no_later_than_ns)
        at = bisect_left(self.stamps, target_ns, 0, end)
        around = [i for i in (at - 1, at) if 0 <= i < end]
        return min(around, key=lambda i: abs(self.stamps[i] - target_ns), default=None)


class _Span:
    """Earliest and latest stamp of the samples of one step, with their keys."""

    def __init__(self) -> None:
        self._samples: list[tuple[int, str]] = []

    def include(self, stamp_ns: int, key: str) -> None:
        self._samples.append((stamp_ns, key))

    def check(self, max_skew_ns: int) -> None:
        (first_ns, early), (last_ns, late) = min(self._samples), max(self._samples)
        if last_ns - first_ns > max_skew_ns:
            raise WindowUnavailable(
                f'{early}: expected a sample within {max_skew_ns / 1e6:.1f} ms of the one of '
                f'{late}, got {(last_ns - first_ns) / 1e6:.1f} ms'
            )


class ObservationWindow:
    """Buffers of every key, and the window of a tick made from them."""

    def __init__(self, spec: WindowSpec) -> None:
        self.spec = spec
        self.arrivals: dict[str, Counter[Arrival]] = {key: Counter() for key in spec.keys}
        self._buffers = {key: _Buffer() for key in spec.keys}

    def add(self, key: str, stamp_ns: int, value: Any, now_ns: int) -> Arrival:
        """Store one message; the module's table says what each answer means."""
        buffer = self._buffers[key]
        if stamp_ns > now_ns + self.spec.future_limit_ns:
            buffer.pending.append((stamp_ns, value))
            arrival = Arrival.FUTURE
        else:
            if buffer.pending:
                # The source is at the present time by now, so that stamps far after it came of a
                # clock that was wrong: old samples that would pass for new ones one day.
                plausible, _ = buffer.split_pending(stamp_ns + self.spec.gap_limit_ns)
                buffer.put_aside(plausible)
            arrival = self._store(buffer, stamp_ns, value)
        self.arrivals[key][arrival] += 1
        return arrival

    def advance(self, now_ns: int) -> list[Arrival]:
        """Store what was put aside as FUTURE and whose time has come."""
        stored = []
        limit_ns = now_ns + self.spec.future_limit_ns
        for key, buffer in self._buffers.items():
            if not buffer.pending:
                continue
            due, later = buffer.split_pending(limit_ns)
            buffer.put_aside(later)
            for stamp_ns, value in sorted(due, key=lambda sample: sample[0]):
                stored.append(self._store(buffer, stamp_ns, value))
                self.arrivals[key][stored[-1]] += 1
        return stored

    def _store(self, buffer: _Buffer, stamp_ns: int, value: Any) -> Arrival:
        newest = buffer.newest
        arrival = Arrival.STORED
        if newest is not None and stamp_ns <= newest:
            if newest - stamp_ns > self.spec.gap_limit_ns:
                buffer.clear()
                arrival = Arrival.BACKWARD
            else:
                at = bisect_left(buffer.stamps, stamp_ns)
                if buffer.stamps[at] == stamp_ns:
                    return Arrival.DUPLICATE
                if newest - stamp_ns > self.spec.span_ns:
                    return Arrival.LATE
                buffer.insert(at, stamp_ns, value)
                return Arrival.REORDERED
        elif newest is not None and stamp_ns - newest > self.spec.gap_limit_ns:
            buffer.clear()
            arrival = Arrival.GAP
        buffer.insert(len(buffer.stamps), stamp_ns, value)
        buffer.trim(stamp_ns - self.spec.span_ns, self.spec.capacity)
        return arrival

    def tick_stamp(self, due_ns: int | None, now_ns: int | None = None) -> int | None:
        """Stamp of the tick to make now, None when there is none yet.

        It is the newest sample of the reference key that is due (half a period early counts: a
        camera is never quite on time) and for which no other key is still behind. A sample after
        `now_ns` waits: the clock of a simulation may lag behind its sensors.
        """
        earliest = None if due_ns is None else due_ns - self.spec.period_ns // 2
        others = [self._buffers[key].newest for key in self.spec.keys[1:]]
        for stamp_ns in reversed(self._buffers[self.spec.keys[0]].stamps):
            if earliest is not None and stamp_ns < earliest:
                return None
            if now_ns is not None and stamp_ns > now_ns:
                continue
            if all(newest is not None and newest >= stamp_ns for newest in others):
                return stamp_ns
        return None

    def window(self, tick_ns: int, now_ns: int) -> dict[str, np.ndarray]:
        """Stack the samples for tick_ns - (steps - 1 ... 0) * period, oldest first.

        Each is the sample nearest to its time, within the tolerance and not after the tick.

        Returns
        -------
        dict
            key -> [steps, ...], stacked copies.

        Raises
        ------
        WindowUnavailable
            when a sample is missing, samples of a step are more than `max_skew_ns` apart, or the
            tick is older than `max_age_ns`.

        """
        spec = self.spec
        if now_ns - tick_ns > spec.max_age_ns:
            raise WindowUnavailable(
                f'{spec.keys[0]}: expected an observation of at most {spec.max_age_ns / 1e9:.3f} '
                f's, got one of {(now_ns - tick_ns) / 1e9:.3f} s'
            )
        stacked = {}
        spans = [_Span() for _ in range(spec.steps)]
        for key, buffer in self._buffers.items():
            chosen = []
            for step in range(spec.steps):
                target_ns = tick_ns - (spec.steps - 1 - step) * spec.period_ns
                at = buffer.nearest(target_ns, tick_ns)
                if at is None or abs(buffer.stamps[at] - target_ns) > spec.tolerance_ns:
                    raise WindowUnavailable(
                        f'{key}: expected a sample within {spec.tolerance_ns / 1e6:.1f} ms of '
                        f'step {step} of {spec.steps}, '
                        + (
                            'got none'
                            if at is None
                            else f'nearest is {(buffer.stamps[at] - target_ns) / 1e6:+.1f} ms off'
                        )
                    )
                chosen.append(buffer.values[at])
                spans[step].include(buffer.stamps[at], key)
            stacked[key] = np.stack(chosen)
        if spec.max_skew_ns is not None:
            for span in spans:
                span.check(spec.max_skew_ns)
        return stacked

    def latest(self, key: str) -> tuple[int, Any] | None:
        """Stamp and value of the newest sample of a key."""
        buffer = self._buffers[key]
        return (buffer.stamps[-1], buffer.values[-1]) if buffer.stamps else None

    def ages_s(self, now_ns: int) -> dict[str, float | None]:
        """Age of the newest sample per key in seconds, None where nothing was received."""
        newest = {key: buffer.newest for key, buffer in self._buffers.items()}
        return {k: None if s is None else (now_ns - s) / 1e9 for k, s in newest.items()}

    def stale(self, now_ns: int) -> list[str]:
        """One reason per key that is missing or older than `max_age_ns`; empty when all live."""
        limit_s = self.spec.max_age_ns / 1e9
        reasons = []
        for key, age_s in self.ages_s(now_ns).items():
            if age_s is None:
                reasons.append(f'{key}: nothing received yet')
            elif age_s > limit_s:
                reasons.append(f'{key}: nothing for {age_s:.2f} s, limit {limit_s:.2f} s')
        return reasons

    def rewind(self, now_ns: int) -> bool:
        """Forget the keys that lie in the future of a clock that jumped back to `now_ns`.

        A key that has samples of the new time already keeps them. Returns whether any was
        cleared.
        """
        cleared = False
        for buffer in self._buffers.values():
            buffer.pending.clear()
            newest = buffer.newest
            if newest is not None and newest > now_ns + self.spec.future_limit_ns:
                buffer.clear()
                cleared = True
        return cleared

    def clear(self) -> None:
        """Forget every sample; the counts of arrivals stay."""
        for buffer in self._buffers.values():
            buffer.clear()
            buffer.pending.clear()
