# SPDX-License-Identifier: Apache-2.0
"""The inference thread: what it commands, what it discards, and how it ends.

The policy here is scripted, so that a tick can be held in flight; the node's tests use a real one.
"""

from __future__ import annotations

import math
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from output_bench import Bench as OutputBench
from output_bench import Recorder
from processes import BUSY_FACTOR, wait_until

from tts_policy.control.gate import OutputGate
from tts_policy.control.observation import ObservationWindow, WindowSpec
from tts_policy.node.tick_report import TickReport, TickSettings
from tts_policy.node.worker import InferenceFailed, InferenceWorker, load_policy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PERIOD = 50_000_000
INTERVAL = 8 * PERIOD
T0 = 10_000_000_000
SPEC = WindowSpec(
    keys=('camera', 'joints'),
    steps=2,
    period_ns=PERIOD,
    tolerance_ns=PERIOD // 2,
    max_age_ns=5 * PERIOD,
    gap_limit_ns=10 * PERIOD,
    future_limit_ns=2 * PERIOD,
)


class ScriptedPolicy:
    """Counts calls; `act` waits until `go` is set, and raises `error` if there is one."""

    recommended_sparsity = 0.8

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.seeds: list[int] = []
        self.go = threading.Event()
        self.go.set()
        self.error: Exception | None = None
        self.actions = np.zeros((15, 3))

    def reset(self, seed: int) -> None:
        self.calls.append('reset')
        self.seeds.append(seed)

    def act(
        self, observation: dict[str, np.ndarray], sparsity: float, committed: Any = None
    ) -> Any:
        self.calls.append('act')
        assert self.go.wait(BUSY_FACTOR * 5.0)
        if self.error is not None:
            raise self.error
        last = int(observation['camera'][-1])
        return SimpleNamespace(last=last, sparsity=sparsity, actions=self.actions)


class Bench:
    """A worker on a clock that the test sets; it keeps the reports that it gets."""

    def __init__(self, limit_s: float = math.inf, command: Any = None) -> None:
        self.policy = ScriptedPolicy()
        self.now_ns = T0
        self.delivered: list[TickReport] = []
        self.resets: list[str] = []
        self.output = OutputBench(command=command)
        self.gate = OutputGate()
        self.gate.enabled = True
        self.worker = InferenceWorker(
            lambda: (self.policy, 0.0),  # type: ignore[arg-type, return-value]
            lambda: self.now_ns,
            self,
            seed=7,
            limit_s=limit_s,
        )
        self.worker.start()
        self.worker.connect(ObservationWindow(SPEC), self.output.output, self.gate)
        self.worker.settings = TickSettings(0.8, interval_ns=INTERVAL)

    def on_tick(self, report: TickReport) -> None:
        self.delivered.append(report)

    def on_reset(self, reason: str) -> None:
        self.resets.append(reason)

    def frames(self, first: int, last: int) -> None:
        """Store joints and camera frames of these indices; the clock follows."""
        for frame in range(first, last + 1):
            self.now_ns = T0 + frame * PERIOD
            self.worker.store('joints', self.now_ns, np.array(frame), measured=np.zeros(3))
            self.worker.store('camera', self.now_ns, np.array(frame))

    def wait(self, deliveries: int) -> None:
        wait_until(lambda: len(self.delivered) >= deliveries, 5, f'{deliveries} deliveries')


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    bench.worker.activate()
    yield bench
    bench.policy.go.set()
    assert bench.worker.stop(5.0)


def stamps(bench: Bench) -> list[int]:
    return [(d.tick.scheduled.stamp_ns - T0) // PERIOD for d in bench.delivered]


def test_ticks_come_every_interval_from_the_second_frame_on(bench: Bench) -> None:
    for last in range(1, 26):
        bench.frames(last - 1 if last == 1 else last, last)
        if last % 8 == 1:
            bench.wait(last // 8 + 1)
    assert stamps(bench) == [1, 9, 17, 25]
    assert bench.policy.calls == ['reset', 'act', 'act', 'act', 'act']
    assert bench.resets == ['activate']
    assert [d.chunk.last for d in bench.delivered] == [1, 9, 17, 25]
    assert all(d.chunk.sparsity == 0.8 and not d.late for d in bench.delivered)


def test_nothing_is_stored_and_nothing_runs_before_activate() -> None:
    bench = Bench()
    bench.frames(0, 5)
    assert bench.worker.inspect()[0] == {'camera': None, 'joints': None}
    assert bench.worker.stop(5.0)
    assert bench.policy.calls == []


def test_reset_in_flight_discards_the_chunk_and_repeats_the_tick(bench: Bench) -> None:
    bench.policy.go.clear()
    bench.frames(0, 1)
    wait_until(lambda: bench.policy.calls[-1:] == ['act'], 5, 'a tick in flight')
    bench.worker.request_reset('service')
    bench.policy.go.set()
    bench.wait(1)
    assert bench.worker.discarded == 1
    assert bench.policy.calls == ['reset', 'act', 'reset', 'act']
    assert stamps(bench) == [1]
    assert bench.resets == ['activate', 'service']


def test_deactivate_in_flight_discards_the_chunk(bench: Bench) -> None:
    bench.policy.go.clear()
    bench.frames(0, 1)
    wait_until(lambda: bench.policy.calls[-1:] == ['act'], 5, 'a tick in flight')
    bench.worker.deactivate()
    bench.policy.go.set()
    wait_until(lambda: bench.worker.discarded == 1, 5, 'the chunk to be discarded')
    assert bench.delivered == []


def test_a_gap_in_flight_discards_the_chunk_and_begins_a_new_episode(bench: Bench) -> None:
    bench.policy.go.clear()
    bench.frames(0, 1)
    wait_until(lambda: bench.policy.calls[-1:] == ['act'], 5, 'a tick in flight')
    bench.frames(30, 31)
    bench.policy.go.set()
    bench.wait(1)
    assert stamps(bench) == [31]
    assert bench.resets == ['activate', 'joints: gap']
    assert bench.policy.seeds == [7, 8]  # one per episode, from the seed given


def test_a_slow_tick_is_late_and_the_next_takes_the_newest_frame(bench: Bench) -> None:
    bench.policy.go.clear()
    bench.frames(0, 1)
    wait_until(lambda: bench.policy.calls[-1:] == ['act'], 5, 'a tick in flight')
    bench.frames(2, 28)
    bench.policy.go.set()
    bench.wait(2)
    assert stamps(bench) == [1, 28]
    assert [d.late for d in bench.delivered] == [True, False]
    assert bench.delivered[1].tick.scheduled.skipped == 2


def test_a_chunk_exactly_one_interval_later_is_still_in_time(bench: Bench) -> None:
    bench.policy.go.clear()
    bench.frames(0, 1)
    wait_until(lambda: bench.policy.calls[-1:] == ['act'], 5, 'a tick in flight')
    bench.now_ns = T0 + PERIOD + INTERVAL
    bench.policy.go.set()
    bench.wait(1)
    assert not bench.delivered[0].late


def test_clock_that_jumps_back_begins_a_new_episode(bench: Bench) -> None:
    bench.frames(0, 1)
    bench.wait(1)
    bench.now_ns = T0 - 40 * PERIOD
    bench.worker.clock_moved(backward=True)
    bench.frames(-40, -39)
    bench.wait(2)
    assert stamps(bench) == [1, -39]
    assert bench.resets == ['activate', 'clock: backward']


def test_messages_ahead_of_the_clock_are_used_when_it_arrives(bench: Bench) -> None:
    bench.now_ns = T0 - 20 * PERIOD
    for frame in (0, 1):
        for key in ('camera', 'joints'):
            bench.worker.store(key, T0 + frame * PERIOD, np.array(frame))
    assert bench.delivered == []
    bench.now_ns = T0 + PERIOD
    bench.worker.clock_moved(backward=False)
    bench.wait(1)
    assert stamps(bench) == [1]


def test_a_policy_that_raises_ends_the_thread_with_the_reason(bench: Bench) -> None:
    bench.policy.error = ValueError('no such thing')
    bench.frames(0, 1)
    wait_until(lambda: bench.worker.failure, 5, 'the failure')
    assert 'ValueError: no such thing' in str(bench.worker.failure)
    assert bench.delivered == []


def test_loading_that_fails_is_raised_with_the_reason() -> None:
    def load() -> Any:
        raise ValueError('model.yaml expected')

    worker = InferenceWorker(load, lambda: T0, SimpleNamespace())
    with pytest.raises(InferenceFailed, match=r'ValueError: model\.yaml expected'):
        worker.start()
    assert worker.stop(1.0)


@pytest.mark.parametrize(('sparsity', 'expected'), [(None, 0.8), (0.0, 0.0), (0.5, 0.5)])
def test_the_latency_before_the_first_tick_is_that_of_the_sparsity_asked_for(
    small_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    sparsity: float | None,
    expected: float,
) -> None:
    pytest.importorskip('torch', reason='torch is not installed')
    from tts_policy.policy.policy import TestTimeSparsePolicy

    asked, act = [], TestTimeSparsePolicy.act

    def recorded(policy: TestTimeSparsePolicy, window: Any, sparsity: float) -> Any:
        asked.append(sparsity)
        return act(policy, window, sparsity)

    monkeypatch.setattr(TestTimeSparsePolicy, 'act', recorded)
    model = (str(small_bundle), 'ddim10', 'cpu', 0, 1, 'auto')
    _, latency_s = load_policy(*model, sparsity)
    assert set(asked) == {expected}
    assert latency_s > 0.0


def test_stop_says_when_the_thread_is_still_busy(bench: Bench) -> None:
    bench.policy.go.clear()
    bench.frames(0, 1)
    wait_until(lambda: bench.policy.calls[-1:] == ['act'], 5, 'a tick in flight')
    assert not bench.worker.stop(0.05)


@pytest.mark.fault
def test_a_delivery_that_hangs_is_a_fault_and_blocks_nobody() -> None:
    """A publish that hangs does so with the worker held: messages and timers must go on."""
    go, hangs = threading.Event(), threading.Event()

    class Hanging(Recorder):
        def send(self, trajectory: Any) -> None:
            hangs.set()
            assert go.wait(BUSY_FACTOR * 5.0)

    bench = Bench(limit_s=0.3, command=Hanging())
    worker = bench.worker
    worker.activate()
    bench.frames(0, 1)
    assert hangs.wait(BUSY_FACTOR * 5.0)
    done = threading.Event()

    def executor() -> None:
        worker.store('joints', T0 + 2 * PERIOD, np.array(2))
        worker.deactivate()
        with worker.exclusive() as held:
            assert not held
        worker.request_reset('service')
        worker.clock_moved(backward=True)
        worker.inspect()
        worker.obey_gate()
        assert not worker.stop(0.0)
        done.set()

    threading.Thread(target=executor, daemon=True).start()
    try:
        assert done.wait(BUSY_FACTOR * 2.0)
        assert 'a chunk was not delivered within 0.3 s' in str(worker.fault())
    finally:
        go.set()
    assert worker.stop(BUSY_FACTOR * 5.0)
    assert bench.policy.calls.count('act') == 1


@pytest.mark.fault
@pytest.mark.parametrize(
    ('actions', 'resets'),
    [(np.full((15, 3), np.nan), ['activate', 'chunk refused']), (np.zeros((15, 3)), ['activate'])],
)
def test_after_a_chunk_that_was_refused_the_policy_forgets_what_made_it(
    bench: Bench, actions: np.ndarray, resets: list[str]
) -> None:
    bench.policy.actions = actions
    bench.frames(0, 1)
    bench.wait(1)
    bench.policy.actions = np.zeros((15, 3))
    bench.frames(2, 9)
    bench.wait(2)
    assert stamps(bench) == [1, 9]
    assert bench.resets == resets


def test_without_a_controller_or_limits_the_policy_keeps_its_episode(bench: Bench) -> None:
    bench.output.output._limits.missing = 'limits: expected a URDF, got none yet'
    bench.frames(0, 1)
    bench.wait(1)
    bench.frames(2, 9)
    bench.wait(2)
    assert bench.delivered[0].refused and bench.resets == ['activate']


@pytest.mark.fault
def test_commands_to_a_robot_whose_clock_is_ahead_have_no_points_that_are_past(
    bench: Bench,
) -> None:
    ahead_ns = 80_000_000  # less than what counts as a message of the future
    for frame in range(2):
        stamp_ns = T0 + frame * PERIOD
        bench.now_ns = stamp_ns - ahead_ns
        bench.worker.store('joints', stamp_ns, np.array(frame), measured=np.zeros(3))
        bench.worker.store('camera', stamp_ns, np.array(frame))
    bench.wait(1)
    (report,) = bench.delivered
    assert report.age_s == 0.0 and report.sent is not None
    assert bench.worker.clock_ahead_s == pytest.approx(0.08)
    # Half a period of inference: the robot's clock decides what is past.
    bench.policy.go.clear()
    bench.now_ns += INTERVAL
    for key in ('joints', 'camera'):
        bench.worker.store(key, bench.now_ns + ahead_ns - PERIOD, np.array(8), np.zeros(3))
        bench.worker.store(key, bench.now_ns + ahead_ns, np.array(9), np.zeros(3))
    wait_until(lambda: bench.policy.calls[-1:] == ['act'], 5, 'a tick in flight')
    bench.now_ns += 3 * PERIOD // 2
    bench.policy.go.set()
    bench.wait(2)
    sent = bench.delivered[1].sent
    assert sent is not None and sent.trajectory.dropped == 1
    assert bench.delivered[1].age_s == pytest.approx(0.075)
