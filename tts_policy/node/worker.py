# SPDX-License-Identifier: Apache-2.0
"""The inference thread: it alone loads, resets and runs the policy, one tick at a time.

Other threads only store messages, and say activate, deactivate or reset. One condition guards the
observation window and every flag. A chunk is delivered while that condition is held and only if
nothing happened since its tick began: once `deactivate` or `request_reset` has returned, no chunk
of before can reach the robot. Only for a delivery that hangs nobody waits longer than a tick may
take: the worker has failed then, for good, and the others go on without the condition.
Stamps are nanoseconds of the ROS clock; latencies perf_counter.
"""

from __future__ import annotations

import math
import threading
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tts_policy.control.ticks import ScheduledTick, TickSchedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tts_policy.control.observation import Arrival, ObservationWindow
    from tts_policy.policy.contract import CommittedActions
    from tts_policy.policy.policy import Chunk, TestTimeSparsePolicy


# How often a wait for the policy looks whether it is still wanted.
_LOOK_S = 0.05


class InferenceFailed(RuntimeError):
    """The thread ended: loading failed, or the policy raised."""


@dataclass(frozen=True)
class Tick:
    """One control tick: the window it saw, what was asked of it, and what it has to continue."""

    scheduled: ScheduledTick
    sparsity: float
    interval_ns: int
    generation: int
    began_s: float
    committed: CommittedActions | None = None

    @property
    def stamp_ns(self) -> int:
        """Stamp of its newest observation."""
        return self.scheduled.stamp_ns

    @property
    def reset(self) -> str | None:
        """Why an episode starts with it, None where one goes on."""
        return self.scheduled.reset

    @property
    def skipped(self) -> int:
        """Ticks that were due before and had no window."""
        return self.scheduled.skipped


@dataclass(frozen=True)
class Delivery:
    """A chunk and its time: latency is wall clock from taking the window to delivery."""

    tick: Tick
    chunk: Chunk
    now_ns: int
    latency_s: float

    @property
    def age_s(self) -> float:
        """Age of the newest observation at delivery (ROS clock)."""
        return (self.now_ns - self.tick.stamp_ns) * 1e-9

    @property
    def late(self) -> bool:
        """Whether the next tick's observation was due before this chunk arrived (ROS clock)."""
        return self.now_ns - self.tick.stamp_ns > self.tick.interval_ns

    @property
    def late_wall(self) -> bool:
        """Whether the wall latency exceeds the replan interval, whatever the ROS clock does."""
        return self.latency_s * 1e9 > self.tick.interval_ns


class InferenceWorker:
    """Owner of the policy, the window and the thread."""

    def __init__(
        self,
        load: Callable[[], TestTimeSparsePolicy],
        now_ns: Callable[[], int],
        deliver: Callable[[Delivery], None],
        on_reset: Callable[[str], None],
        seed: int = 0,
        commit: Callable[[ScheduledTick], CommittedActions | None] = lambda tick: None,
        limit_s: float = math.inf,
    ) -> None:
        """`commit` is asked at every tick that goes on with an episode what it must continue.

        A tick that takes more than `limit_s`, delivery included, is a fault.
        """
        self.policy: TestTimeSparsePolicy | None = None
        self.failure: str | None = None
        self.discarded = 0
        self._seed = seed
        self._ticks: TickSchedule | None = None
        self._load = load
        self._now_ns = now_ns
        self._deliver = deliver
        self._on_reset = on_reset
        self._commit = commit
        self._limit_s = limit_s
        self._condition = threading.Condition()
        self._loaded = threading.Event()
        self._active = False
        self._stopping = False
        self._generation = 0
        self._began_s: float | None = None
        self._sparsity = 0.0
        self._interval_ns = 1
        self._thread = threading.Thread(target=self._main, name='inference', daemon=True)

    @property
    def window(self) -> ObservationWindow | None:
        """The window that messages go to; set it before `activate`."""
        return None if self._ticks is None else self._ticks.window

    @window.setter
    def window(self, window: ObservationWindow) -> None:
        self._ticks = TickSchedule(window)

    @property
    def waiting_for(self) -> str:
        """What the next tick lacks; empty when nothing."""
        return '' if self._ticks is None else self._ticks.waiting_for

    def start(self, interrupted: Callable[[], bool] = lambda: False) -> TestTimeSparsePolicy:
        """Start the thread and wait until it has loaded the policy.

        Raises
        ------
        InferenceFailed
            with the reason when loading fails, or as soon as it is `interrupted`.

        """
        self._thread.start()
        while not self._loaded.wait(_LOOK_S):
            if interrupted():
                raise InferenceFailed('told to stop while loading')
        if self.policy is None:
            raise InferenceFailed(self.failure)
        return self.policy

    def fault(self) -> str | None:
        """Why the thread cannot be relied on: it ended, or a tick takes too long. Never waits."""
        if self.failure is not None:
            return f'inference failed: {self.failure}'
        if not self._thread.is_alive():
            return 'inference failed: the thread is gone'
        began_s = self._began_s
        busy_s = 0.0 if began_s is None else time.perf_counter() - began_s
        if busy_s > self._limit_s:
            return f'inference failed: a tick has taken {busy_s:.1f} s, limit {self._limit_s:g} s'
        return None

    def stop(self, timeout_s: float) -> bool:
        """End the thread; False when it is still inside the policy after the timeout.

        One that still loads is not waited for.
        """
        with self.exclusive() as held:
            self._stopping = True
            self._active = False
            self._generation += 1
            if held:
                self._condition.notify_all()
        self._thread.join(timeout_s if self._loaded.is_set() else 0.0)
        return not self._thread.is_alive()

    def activate(self) -> None:
        """Begin a new episode with an empty window."""
        with self.exclusive() as held:
            if not held:
                return
            self._active = True
            self._generation += 1
            if self._ticks is not None:
                self._ticks.begin('activate')
            self._condition.notify_all()

    def deactivate(self) -> None:
        """Stop ticking; the chunk in flight will be discarded."""
        with self.exclusive():
            self._active = False
            self._generation += 1

    def configure_ticks(self, sparsity: float, interval_ns: int) -> None:
        """Take effect together, at the next tick."""
        with self.exclusive():
            self._sparsity = sparsity
            self._interval_ns = interval_ns

    def request_reset(self, reason: str) -> bool:
        """Forget the episode before the next tick; the window and the rhythm of ticks stay.

        False where a delivery hangs, and there will be no next tick.
        """
        with self.exclusive() as held:
            if held:
                self._restart(reason, keep_rhythm=True)
            return held

    def store(self, key: str, stamp_ns: int, value: Any) -> Arrival | None:
        """Put a message into the window; None when the node is not active."""
        with self.exclusive() as held:
            if not held or not self._active or self._ticks is None:
                return None
            now_ns = self._now_ns()
            arrival = self._ticks.store(key, stamp_ns, value, now_ns)
            self._generation += arrival.breaks_continuity
            self._advance(now_ns)
            return arrival

    def clock_moved(self, backward: bool) -> None:
        """Tell of a step of a simulated clock."""
        with self.exclusive() as held:
            if not held or self._ticks is None:
                return
            now_ns = self._now_ns()
            if backward:
                self._ticks.window.rewind(now_ns)
                self._restart('clock: backward', keep_rhythm=False)
            self._advance(now_ns)

    @contextmanager
    def exclusive(self) -> Iterator[bool]:
        """No chunk is delivered, and no tick begins, inside; False where a delivery hangs."""
        held = self._acquire()
        try:
            yield held
        finally:
            if held:
                self._condition.release()

    def inspect(self) -> tuple[dict[str, float | None], list[str]]:
        """Ages of the newest samples in seconds, and a reason per key that is stale."""
        with self.exclusive():
            if self.window is None:
                return {}, []
            now_ns = self._now_ns()
            return self.window.ages_s(now_ns), self.window.stale(now_ns)

    def latest(self, key: str) -> np.ndarray | None:
        """Value of the newest sample of a key."""
        with self.exclusive():
            newest = None if self.window is None else self.window.latest(key)
            return None if newest is None else newest[1]

    def _acquire(self) -> bool:
        """Wait for the condition until the tick that holds it takes too long."""
        while not self._condition.acquire(timeout=_LOOK_S if self.failure is None else 0.0):
            if self.fault() is not None:
                self.failure = (
                    self.failure or f'a chunk was not delivered within {self._limit_s:g} s'
                )
                return False
        return True

    def _advance(self, now_ns: int) -> None:
        assert self._ticks is not None
        self._generation += self._ticks.advance(now_ns)
        self._condition.notify_all()

    def _restart(self, reason: str, keep_rhythm: bool) -> None:
        self._generation += 1
        if self._ticks is not None:
            self._ticks.restart(reason, keep_rhythm)
        self._condition.notify_all()

    def _main(self) -> None:
        try:
            self.policy = self._load()
        except Exception as error:  # noqa: BLE001 - the reason must reach the node, whatever it is
            self.failure = f'{type(error).__name__}: {error}'
            return
        finally:
            self._loaded.set()
        try:
            while self._tick():
                pass
        except Exception as error:  # noqa: BLE001 - a dead thread must be seen
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.failure = f'{type(error).__name__}: {error} ({where.name}, line {where.lineno})'

    def _tick(self) -> bool:
        """Wait for a tick, run it, deliver its chunk; False when it is time to end."""
        assert self.policy is not None
        with self._condition:
            tick = self._next_tick()
            while tick is None and not self._stopping:
                self._condition.wait()
                tick = self._next_tick()
            if tick is None or self._stopping:
                return False
            self._began_s = tick.began_s
        if tick.reset is not None:
            # A seed per episode: a replayed recording draws the same noise wherever it starts.
            self.policy.reset(self._seed + tick.scheduled.episode)
        chunk = self.policy.act(
            tick.scheduled.observation, sparsity=tick.sparsity, committed=tick.committed
        )
        with self._condition:
            if tick.generation != self._generation:
                self.discarded += 1
                self._began_s = None
                return not self._stopping
            assert self._ticks is not None
            self._ticks.finish(tick.scheduled, tick.interval_ns)
            self._deliver(
                Delivery(tick, chunk, self._now_ns(), time.perf_counter() - tick.began_s)
            )
            self._began_s = None
        return True

    def _next_tick(self) -> Tick | None:
        """Take the next tick if there is one."""
        if not self._active or self._stopping or self._ticks is None:
            return None
        scheduled = self._ticks.take(self._now_ns(), self._interval_ns)
        if scheduled is None:
            return None
        if scheduled.reset is not None:
            self._on_reset(scheduled.reset)
        return Tick(
            scheduled,
            self._sparsity,
            self._interval_ns,
            self._generation,
            time.perf_counter(),
            self._commit(scheduled) if scheduled.reset is None else None,
        )


def load_policy(
    path: str,
    sampler: str,
    device: str,
    seed: int,
    threads: int,
    engine: str,
    sparsity: float | None = None,
    warmed: Callable[[float], None] = lambda latency_s: None,
) -> TestTimeSparsePolicy:
    """Load a bundle and warm it up; to be called by the thread that will run it.

    `warmed` is told the latency in seconds of a tick at that sparsity, None for the recommended.

    Raises
    ------
    ValueError
        BundleError, naming the file and what is wrong with it; a sparsity out of range.

    """
    from tts_policy.policy.policy import TestTimeSparsePolicy

    if not path:
        raise ValueError('bundle: expected the path of a model bundle, got none')
    policy = TestTimeSparsePolicy.from_bundle(path, sampler, device, seed, threads, engine)
    spec = policy.contract.observation
    grey: dict[str, np.ndarray] = {
        camera.key: np.full((spec.steps, camera.height, camera.width, 3), 127, dtype=np.uint8)
        for camera in spec.cameras
    }
    grey['joints'] = np.zeros((spec.steps, len(spec.joints)))
    policy.reset()
    # The first tick is dense; of the sparse ones the first is slower than what follows.
    share = policy.recommended_sparsity if sparsity is None else sparsity
    chunks = [policy.act(grey, sparsity=share) for _ in range(3)]
    warmed(chunks[-1].stats.latency_s)
    policy.reset()
    return policy
