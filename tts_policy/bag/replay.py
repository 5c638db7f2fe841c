# SPDX-License-Identifier: Apache-2.0
"""The ticks that the live node makes when a recording is played to it, and what came after them.

Time is that of the header stamps: it stands at the newest one seen, so that ticks depend neither
on how fast a recording is read nor on the delays it was recorded with. `play_bag --lockstep`
sets /clock by the same rule.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tts_policy.bag.reader import BagError
from tts_policy.bag.samples import Command, Sample, SampleReader
from tts_policy.core.contract import PolicyContract
from tts_policy.ros.observation import Arrival, ObservationWindow, WindowSpec
from tts_policy.ros.ticks import ScheduledTick, TickSchedule


@dataclass(frozen=True)
class RecordedTick:
    """A tick and the recorded set-points or positions [T - To + 1, A], NaN where unknown."""

    scheduled: ScheduledTick
    future: NDArray[np.float64]


class RecordedFuture:
    """Recent joint states and commands of a recording: what the robot did after a tick.

    With commands, entry a is the set-point in force at tick + a periods, at its due time
    `offset_steps` periods later; without, it is the position measured at that due time.
    """

    def __init__(self, contract: PolicyContract, commanded: bool) -> None:
        self._period_ns = round(contract.observation.period_s * 1e9)
        self._offset_ns = contract.action.offset_steps * self._period_ns
        self._count, self._width = contract.usable_actions, len(contract.action.joints)
        self._commanded = commanded
        self._stamps: list[int] = []
        self._values: list[Command | NDArray[np.float64]] = []

    def add(self, sample: Sample) -> None:
        """Take a joint state or a command, whichever is the reference, if it is the newest."""
        value = sample.command if self._commanded else sample.acted
        if value is not None and (not self._stamps or sample.stamp_ns > self._stamps[-1]):
            self._stamps.append(sample.stamp_ns)
            self._values.append(value)

    def known(self, tick_ns: int, now_ns: int) -> bool:
        """Whether all that a tick is compared with has been seen, or is overdue by as much."""
        span_ns = self._count * self._period_ns + self._offset_ns
        if now_ns >= tick_ns + 2 * span_ns:
            return True
        return bool(self._stamps) and self._stamps[-1] >= tick_ns + span_ns

    def after(self, tick_ns: int) -> NDArray[np.float64]:
        """Reference [T - To + 1, A] of a tick."""
        future = np.full((self._count, self._width), np.nan)
        for a in range(self._count):
            time_ns = tick_ns + a * self._period_ns
            future[a] = self._at(time_ns if self._commanded else time_ns + self._offset_ns)
        return future

    def _at(self, time_ns: int) -> NDArray[np.float64] | float:
        at = bisect_right(self._stamps, time_ns) - 1
        # What is still in force long after the last message is not known.
        if at < 0 or (
            at + 1 == len(self._stamps) and time_ns - self._stamps[at] > self._period_ns
        ):
            return np.nan
        value = self._values[at]
        if isinstance(value, Command):
            return value.at(time_ns + self._offset_ns)
        if at + 1 == len(self._stamps):
            return value
        following = self._values[at + 1]
        assert not isinstance(following, Command)
        share = (time_ns - self._stamps[at]) / (self._stamps[at + 1] - self._stamps[at])
        return value + share * (following - value)

    def forget_before(self, time_ns: int) -> None:
        """Drop what no tick from `time_ns` on is compared with."""
        first = max(0, bisect_right(self._stamps, time_ns) - 1)
        del self._stamps[:first], self._values[:first]


class RecordedTicks:
    """Iterates over the ticks of a recording, `interval_ns` apart, in bounded memory.

    `window` counts the arrivals per key, `now_ns` is the time of the replay, and `waiting_for`
    says what the next tick lacks.
    """

    def __init__(
        self, samples: SampleReader, interval_ns: int, spec: WindowSpec | None = None
    ) -> None:
        self.samples = samples
        self.interval_ns = interval_ns
        self.window = ObservationWindow(spec or WindowSpec.of(samples.contract.observation))
        self.now_ns = 0
        self.waiting_for = ''

    def __iter__(self) -> Iterator[RecordedTick]:
        """Ticks in order.

        Raises
        ------
        BagError
            where the recording is damaged or its clock goes back, after the ticks before that.

        """
        future = RecordedFuture(self.samples.contract, self.samples.has_commands)
        waiting: deque[ScheduledTick] = deque()
        damage: BagError | None = None
        source = self._scheduled(future)
        while True:
            try:
                tick = next(source)
            except StopIteration:
                break
            except BagError as error:
                damage = error
                break
            if tick is not None:
                waiting.append(tick)
            while waiting and future.known(waiting[0].stamp_ns, self.now_ns):
                yield self._recorded(waiting.popleft(), future)
        while waiting:
            yield self._recorded(waiting.popleft(), future)
        if damage is not None:
            raise damage

    def _recorded(self, tick: ScheduledTick, future: RecordedFuture) -> RecordedTick:
        recorded = RecordedTick(tick, future.after(tick.stamp_ns))
        future.forget_before(tick.stamp_ns)
        return recorded

    def _scheduled(self, future: RecordedFuture) -> Iterator[ScheduledTick | None]:
        """Ticks, and None after every sample that brings none."""
        schedule = TickSchedule(self.window)
        schedule.begin('start')
        self.now_ns = 0
        for sample in self.samples:
            future.add(sample)
            if sample.key == 'cut':
                schedule.restart('cut', keep_rhythm=False)
            if sample.value is None:
                continue
            now_ns = self.now_ns = max(self.now_ns, sample.stamp_ns)
            arrival = schedule.store(sample.key, sample.stamp_ns, sample.value, now_ns)
            if arrival is Arrival.BACKWARD:
                raise BagError(
                    f'{self.samples.bag.path}: {sample.key}: stamps that go forward expected, got '
                    f'{sample.stamp_ns} ns after {now_ns} ns'
                )
            while (tick := schedule.take(now_ns, self.interval_ns)) is not None:
                schedule.finish(tick, self.interval_ns)
                yield tick
            self.waiting_for = schedule.waiting_for
            yield None
