# SPDX-License-Identifier: Apache-2.0
"""The inference thread: it owns the policy and takes every tick from its window to its command.

    store -> TickSchedule (when, on which window) -> policy -> CommandOutput -> Reports

Other threads only store messages and ask for activation, deactivation, a reset or a hold. One
condition guards the window, the output stage and every flag. A chunk is delivered while that
condition is held, and only if nothing has happened since its tick began: once `deactivate` or
`request_reset` has returned, no earlier chunk can reach the robot. If a delivery hangs for longer
than a tick may take, the worker has failed for good and the other threads go on without the
condition. Stamps are nanoseconds of the ROS clock; latencies are perf_counter.
"""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from tts_policy.control.conversions import seconds_to_ns
from tts_policy.control.latency_budget import SparsityGovernor
from tts_policy.control.observation import Arrival
from tts_policy.control.ticks import TickSchedule
from tts_policy.control.trajectory import ChunkTooLate, NotReady, TrajectoryRefused
from tts_policy.node.tick_report import CHUNK_REFUSED, Reports, Tick, TickReport, TickSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tts_policy.control.gate import OutputGate
    from tts_policy.control.observation import ObservationWindow
    from tts_policy.control.output import CommandOutput
    from tts_policy.policy.policy import Chunk, TestTimeSparsePolicy


# Pause between two looks at whether a wait for the policy is still wanted.
_LOOK_S = 0.05
# How long a hold may take to go out after the inference thread has failed.
_HOLD_TIMEOUT_S = 0.5
# Samples by which the lead of the sensors' clock is known: a second or two of joint states.
_AHEAD_SAMPLES = 256
# Ticks before a measured latency replaces the one measured while warming up.
_ENOUGH_TICKS = 20


class InferenceFailed(RuntimeError):
    """The thread ended: loading failed, or the policy raised."""


class InferenceWorker:
    """Owner of the policy, the window, the output stage and the thread.

    `load` returns a policy and the latency in s of one tick, which becomes `warm_latency_s`. A
    tick that takes more than `limit_s`, delivery included, is a fault.
    """

    def __init__(
        self,
        load: Callable[[], tuple[TestTimeSparsePolicy, float]],
        now_ns: Callable[[], int],
        reports: Reports,
        seed: int = 0,
        limit_s: float = math.inf,
    ) -> None:
        self.policy: TestTimeSparsePolicy | None = None
        self.failure: str | None = None
        self.discarded = 0
        self.settings = TickSettings()
        self.warm_latency_s = 0.0
        self.simulated = False
        self._load = load
        self._now_ns = now_ns
        self._reports = reports
        self._seed = seed
        self._limit_s = limit_s
        self._ages_s: deque[float] = deque(maxlen=256)
        self._ahead_ns: deque[int] = deque([0], maxlen=_AHEAD_SAMPLES)
        self._condition = threading.Condition()
        self._loaded = threading.Event()
        self._active = False
        self._stopping = False
        self._generation = 0
        self._began_s: float | None = None
        self._thread = threading.Thread(target=self._main, name='inference', daemon=True)

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
        self._governor = SparsityGovernor(self.policy.recommended_sparsity)
        return self.policy

    def connect(self, window: ObservationWindow, output: CommandOutput, gate: OutputGate) -> None:
        """Say where samples go and where commands leave; to be called before `activate`."""
        self._ticks = TickSchedule(window)
        self._output = output
        self._gate = gate

    # What other threads ask for

    @property
    def active(self) -> bool:
        """Whether ticks are made."""
        return self._active

    @property
    def sparsity(self) -> float:
        """Sparsity of the next tick: as requested, or raised to keep the latency budget."""
        return self._governor.choose(self.settings.sparsity)

    @property
    def clock_ahead_s(self) -> float:
        """By how much the clock that stamps the sensors is ahead of ours, at least."""
        return max(self._ahead_ns) * 1e-9

    def latency_s(self) -> float:
        """Time from an observation to its chunk: measured p95 (ROS clock), first as warmed up."""
        with self.exclusive():
            if len(self._ages_s) < _ENOUGH_TICKS:
                return self.warm_latency_s
            return float(np.percentile(self._ages_s, 95))

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

        A thread that is still loading is not waited for.
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
        """Begin a new episode with an empty window; nothing has been commanded yet."""
        with self.exclusive() as held:
            if not held:
                return
            self._output.begin()
            self._active = True
            self._generation += 1
            self._ticks.begin('activate')
            self._ahead_ns.clear()
            self._ahead_ns.append(0)
            self._condition.notify_all()

    def deactivate(self) -> None:
        """Stop ticking; the chunk in flight will be discarded."""
        with self.exclusive():
            self._active = False
            self._generation += 1

    def request_reset(self, reason: str) -> bool:
        """Forget the episode before the next tick; the window and the rhythm of ticks stay.

        False where a delivery hangs, and there will be no next tick.
        """
        with self.exclusive() as held:
            if held:
                self._restart(reason, keep_rhythm=True)
            return held

    def store(
        self, key: str, stamp_ns: int, value: Any, measured: np.ndarray | None = None
    ) -> Arrival | None:
        """Put a sample into the window; None when the node is not active.

        `measured`: positions [A] of the commanded joints, where the sample holds them.
        """
        with self.exclusive() as held:
            if not held or not self._active:
                return None
            now_ns = self._now_ns()
            arrival = self._ticks.store(key, stamp_ns, value, now_ns)
            if arrival is not Arrival.FUTURE:
                self._ahead_ns.append(0 if self.simulated else max(0, stamp_ns - now_ns))
            if measured is not None:
                self._output.measured(stamp_ns, measured, self._clock_ns())
            self._generation += arrival.breaks_continuity
            self._advance(now_ns)
            return arrival

    def clock_moved(self, backward: bool) -> None:
        """Report a jump of simulated time."""
        with self.exclusive() as held:
            if not held or not self._active:
                return
            now_ns = self._now_ns()
            if backward:
                self._ticks.window.rewind(now_ns)
                self._restart('clock: backward', keep_rhythm=False)
            self._advance(now_ns)

    def hold(self) -> bool:
        """Bring the arm to rest, once; False when nothing was commanded or the hold is stuck.

        Once the inference thread has failed, the way out may be what it hangs in: then the hold is
        sent from a thread of its own, which is waited for only briefly.
        """
        if self.fault() is None:
            with self.exclusive() as held:
                if held:
                    return self._output.hold(self._clock_ns())
        sent: list[bool] = []
        thread = threading.Thread(
            target=lambda: sent.append(self._output.hold(self._clock_ns())),
            name='hold',
            daemon=True,
        )
        thread.start()
        thread.join(_HOLD_TIMEOUT_S)
        return any(sent)

    def obey_gate(self) -> str | None:
        """Hold if the gate is closed; why, where that sent a hold. Chunks in flight are proposed.

        Nothing happens before `connect`.
        """
        with self.exclusive():
            closed = self._gate.closed_by(time.monotonic())
            return closed if closed is not None and self.hold() else None

    @contextmanager
    def exclusive(self) -> Iterator[bool]:
        """No chunk is delivered, and no tick begins, inside; False where a delivery hangs."""
        held = self._acquire()
        try:
            yield held
        finally:
            if held:
                self._condition.release()

    def inspect(self) -> tuple[dict[str, float | None], list[str], str]:
        """Ages of the newest samples in s, a reason per stale key, what the next tick lacks."""
        with self.exclusive():
            window, now_ns = self._ticks.window, self._clock_ns()
            return window.ages_s(now_ns), window.stale(now_ns), self._ticks.waiting_for

    def _clock_ns(self) -> int:
        """Now by the clock that stamps the sensors, of which no sample is ahead.

        The robot times commands by its clock too. Simulated time is waited for instead.
        """
        return self._now_ns() + max(self._ahead_ns)

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
        self._generation += self._ticks.advance(now_ns)
        self._condition.notify_all()

    def _restart(self, reason: str, keep_rhythm: bool) -> None:
        self._generation += 1
        self._ticks.restart(reason, keep_rhythm)
        self._condition.notify_all()

    # The thread

    def _main(self) -> None:
        try:
            self.policy, self.warm_latency_s = self._load()
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
        if tick.scheduled.reset is not None:
            # A seed per episode: a replayed recording draws the same noise wherever it starts.
            self.policy.reset(self._seed + tick.scheduled.episode)
        chunk = self.policy.act(
            tick.scheduled.observation, sparsity=tick.sparsity, committed=tick.committed
        )
        with self._condition:
            if tick.generation == self._generation:
                self._ticks.finish(tick.scheduled, tick.interval_ns)
                self._deliver(tick, chunk)
            else:
                self.discarded += 1
            self._began_s = None
            return not self._stopping

    def _next_tick(self) -> Tick | None:
        """Take the next tick if there is one."""
        if not self._active or self._stopping:
            return None
        settings = self.settings
        scheduled = self._ticks.take(self._clock_ns(), settings.interval_ns)
        if scheduled is None:
            return None
        committed = None
        if scheduled.reset is not None:
            self._reports.on_reset(scheduled.reset)
        elif settings.continuing != 'none':
            delay_ns = seconds_to_ns(self.latency_s())
            committed = self._output.committed(
                scheduled.stamp_ns, delay_ns, self._enabled(), settings.continuing == 'soft'
            )
        return Tick(
            scheduled,
            self.sparsity,
            settings.interval_ns,
            self._generation,
            time.perf_counter(),
            committed,
        )

    def _enabled(self) -> bool:
        return self._gate.closed_by(time.monotonic()) is None

    def _deliver(self, tick: Tick, chunk: Chunk) -> None:
        """Command or propose a chunk, and report the tick."""
        now_ns, latency_s = self._clock_ns(), time.perf_counter() - tick.began_s
        sent, refused, too_late = None, None, False
        try:
            sent = self._output.send(
                chunk.actions, tick.scheduled.stamp_ns, now_ns, self._enabled()
            )
        except TrajectoryRefused as error:
            refused, too_late = str(error), isinstance(error, ChunkTooLate)
            if not isinstance(error, (ChunkTooLate, NotReady)):
                # What made the chunk bad is in the feature cache, and would be in the next ones.
                self._ticks.restart(CHUNK_REFUSED, keep_rhythm=True)
        if tick.scheduled.reset is None:
            self._governor.record(
                latency_s, self.settings.sparsity, self.settings.latency_budget_s
            )
        report = TickReport(
            tick, chunk, now_ns, latency_s, sent, refused, too_late, self._governor.short_s
        )
        self._ages_s.append(report.age_s)
        self._reports.on_tick(report)


def load_policy(
    path: str,
    sampler: str,
    device: str,
    seed: int,
    threads: int,
    engine: str,
    sparsity: float | None = None,
) -> tuple[TestTimeSparsePolicy, float]:
    """Load a bundle and warm it up; to be called by the thread that will run it.

    Returns the policy and the latency in s of a tick at that sparsity (None: the recommended one).

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
    policy.reset()
    return policy, chunks[-1].stats.latency_s
