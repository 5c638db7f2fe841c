# SPDX-License-Identifier: Apache-2.0
"""The ticks that the live node makes when a recording is played to it, and what came after them.

Time is that of the header stamps: it stands at the newest one seen, so that ticks depend neither
on how fast a recording is read nor on the delays it was recorded with. In lockstep `play_bag`
sets /clock by the same rule.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tts_policy.control.observation import Arrival, ObservationWindow, WindowSpec
from tts_policy.control.ticks import ScheduledTick, TickSchedule
from tts_policy.data.reader import BagError
from tts_policy.data.samples import Command, Sample, SampleSource
from tts_policy.policy.contract import PolicyContract


@dataclass(frozen=True)
class RecordedTick:
    """A tick and what was recorded around it, as `RecordedFuture` defines it."""

    scheduled: ScheduledTick
    future: NDArray[np.float64]


class RecordedFuture:
    """Recent joint states and commands of a recording: what the robot did around a tick.

    Row a, from -past_steps to T - To, belongs to time tick + a periods. With commands it is the
    set-point then in force, at its due time `lead_steps` periods later; without, it is the
    position measured at that due time. lead_steps None takes the contract's offset_steps.
    """

    def __init__(
        self,
        contract: PolicyContract,
        commanded: bool,
        past_steps: int = 0,
        lead_steps: int | None = None,
    ) -> None:
        self._period_ns = round(contract.observation.period_s * 1e9)
        lead_steps = contract.action.offset_steps if lead_steps is None else lead_steps
        self._lead_ns = lead_steps * self._period_ns
        self._steps = range(-past_steps, contract.usable_actions)
        self._width = len(contract.action.joints)
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
        span_ns = self._steps.stop * self._period_ns + self._lead_ns
        if now_ns >= tick_ns + 2 * span_ns:
            return True
        return bool(self._stamps) and self._stamps[-1] >= tick_ns + span_ns

    def around(self, tick_ns: int) -> NDArray[np.float64]:
        """Reference [past_steps + T - To + 1, A] of a tick, NaN where unknown."""
        future = np.full((len(self._steps), self._width), np.nan)
        for row, step in enumerate(self._steps):
            time_ns = tick_ns + step * self._period_ns
            future[row] = self._at(time_ns if self._commanded else time_ns + self._lead_ns)
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
            return value.at(time_ns + self._lead_ns)
        if at + 1 == len(self._stamps):
            return value
        following = self._values[at + 1]
        assert not isinstance(following, Command)
        share = (time_ns - self._stamps[at]) / (self._stamps[at + 1] - self._stamps[at])
        return value + share * (following - value)

    def forget_before(self, tick_ns: int) -> None:
        """Drop what no tick from `tick_ns` on is compared with."""
        first_ns = tick_ns + self._steps.start * self._period_ns
        first = max(0, bisect_right(self._stamps, first_ns) - 1)
        del self._stamps[:first], self._values[:first]


class ReplaySchedule:
    """The node's ticks for the samples of a recording; `now_ns` is the newest stamp seen."""

    def __init__(self, spec: WindowSpec, interval_ns: int) -> None:
        self._schedule = TickSchedule(ObservationWindow(spec))
        self._interval_ns = interval_ns
        self.now_ns = 0
        self._schedule.begin('start')

    @property
    def waiting_for(self) -> str:
        """What the next tick lacks."""
        return self._schedule.waiting_for

    def add(self, sample: Sample) -> list[ScheduledTick]:
        """Ticks that this sample makes possible, mostly none.

        Raises
        ------
        ValueError
            if the sample is stamped so long before others of its key that the clock went back.

        """
        if sample.key == 'cut':
            self._schedule.restart('cut', keep_rhythm=False)
        if sample.value is None:
            return []
        before_ns = self.now_ns
        self.now_ns = max(self.now_ns, sample.stamp_ns)
        arrival = self._schedule.store(sample.key, sample.stamp_ns, sample.value, self.now_ns)
        if arrival is Arrival.BACKWARD:
            raise ValueError(
                f'{sample.key}: expected stamps that go forward, got {sample.stamp_ns} ns after '
                f'{before_ns} ns'
            )
        ticks = []
        while (tick := self._schedule.take(self.now_ns, self._interval_ns)) is not None:
            self._schedule.finish(tick, self._interval_ns)
            ticks.append(tick)
        return ticks


class RecordedTicks:
    """Iterates over the ticks of a recording, `interval_ns` apart, in bounded memory.

    `observe` sees every sample.
    """

    def __init__(
        self,
        samples: SampleSource,
        interval_ns: int,
        spec: WindowSpec | None = None,
        future: RecordedFuture | None = None,
        observe: Callable[[Sample], None] | None = None,
    ) -> None:
        self.samples, self._observe = samples, observe
        self._future = future or RecordedFuture(samples.contract, samples.has_commands)
        self.schedule = ReplaySchedule(
            spec or WindowSpec.of(samples.contract.observation), interval_ns
        )

    def __iter__(self) -> Iterator[RecordedTick]:
        """Ticks in order.

        Raises
        ------
        BagError
            where the recording is damaged or its clock goes back, after the ticks before that.

        """
        future = self._future
        waiting: deque[ScheduledTick] = deque()
        damage: BagError | None = None
        try:
            for sample in self.samples:
                if self._observe is not None:
                    self._observe(sample)
                future.add(sample)
                waiting.extend(self._add(sample))
                while waiting and future.known(waiting[0].stamp_ns, self.schedule.now_ns):
                    yield self._recorded(waiting.popleft())
        except BagError as error:
            damage = error
        while waiting:
            yield self._recorded(waiting.popleft())
        if damage is not None:
            raise damage

    def _add(self, sample: Sample) -> list[ScheduledTick]:
        try:
            return self.schedule.add(sample)
        except ValueError as error:
            raise BagError(f'{self.samples.name}: {error}') from None

    def _recorded(self, tick: ScheduledTick) -> RecordedTick:
        recorded = RecordedTick(tick, self._future.around(tick.stamp_ns))
        self._future.forget_before(tick.stamp_ns)
        return recorded
