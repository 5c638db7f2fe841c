# SPDX-License-Identifier: Apache-2.0
"""What the node reports about itself: faults, tick statistics, /diagnostics and ~/chunk_stats.

A fault stays in the report for `Faults.HOLD_S` seconds after it was last seen, so that a report
once a second shows it at least once. Latencies are wall clock; ages are of the ROS clock.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter, deque
from dataclasses import asdict, astuple, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from std_msgs.msg import String

from tts_policy.node.interface import CHUNK_STATS, DIAGNOSTICS, PLAN_IMAGE
from tts_policy.node.messages import ns_to_time, plan_image
from tts_policy.node.tick_report import CHUNK_REFUSED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rclpy.lifecycle import LifecycleNode

    from tts_policy.node.tick_report import TickReport
    from tts_policy.node.worker import InferenceWorker
    from tts_policy.policy.denoisers.blocks import BlockStack
    from tts_policy.policy.policy import ChunkStats

OK = DiagnosticStatus.OK
WARN = DiagnosticStatus.WARN
ERROR = DiagnosticStatus.ERROR
# A tick that lacks something for so many looks in a row is reported: the first frame never has a
# window.
WAITS_BEFORE_WARNING = 8
DISCOVERY_S = 0.5
CLOCK_AHEAD_S = 0.005


class Monitor:
    """Faults and statistics of one node, and the reports made of them.

    `failure` is a reason that stays in the report until the next configure, or an activate that
    succeeds. May be used from several threads.
    """

    def __init__(self, node: LifecycleNode) -> None:
        self.failure: str | None = None
        self._node = node
        self._lock = threading.Lock()
        self._statistics = TickStatistics()
        self._faults = Faults()
        self._active_since_s = 0.0
        self._waits = 0
        topic = DIAGNOSTICS
        self._publisher = node.create_publisher(topic.kind, topic.name, topic.qos)
        self._chunk_stats: Any = None
        self._plan_image: Any = None

    def begin(self) -> None:
        """Start anew: a new configuration."""
        with self._lock:
            self._statistics = TickStatistics()
        self.failure = None
        self._faults.clear()

    def open(self) -> None:
        """Create the topics of the ticks, until `close`."""
        self._chunk_stats, self._plan_image = (
            self._node.create_lifecycle_publisher(topic.kind, topic.name, topic.qos)
            for topic in (CHUNK_STATS, PLAN_IMAGE)
        )

    def close(self) -> None:
        """Destroy the topics of the ticks."""
        for publisher in (self._chunk_stats, self._plan_image):
            self._node.destroy_lifecycle_publisher(publisher)

    def activated(self) -> None:
        """Forget why the node was not active; be patient with missing input for a while."""
        self.failure = None
        self._active_since_s = time.monotonic()
        self._waits = 0

    def error(self, subject: str, reason: str) -> None:
        """Report something that stops the arm; logged at most every few seconds."""
        if self._faults.raise_(ERROR, subject, reason):
            self._node.get_logger().error(reason)

    def warn(self, subject: str, reason: str) -> None:
        """Report something that the node copes with; logged at most every few seconds."""
        if self._faults.raise_(WARN, subject, reason):
            self._node.get_logger().warning(reason)

    def fail(self, reason: str) -> None:
        """Report what will not go away by itself."""
        self.failure = reason
        self._node.get_logger().error(reason)

    def refuse_message(self, topic: str, reason: str) -> None:
        """Count and report a message that does not fit the contract."""
        with self._lock:
            self._statistics.refused_messages[topic] += 1
        self.error(topic, f'message refused: {reason}')

    def on_reset(self, reason: str) -> None:
        """Count the beginning of an episode."""
        with self._lock:
            self._statistics.resets[reason] += 1
        if reason != CHUNK_REFUSED:  # the refusal itself is logged, less often
            self._node.get_logger().info(f'new episode ({reason})')

    def on_tick(self, report: TickReport) -> None:
        """Count a tick, report what was wrong with it, and publish its statistics and plan."""
        with self._lock:
            self._statistics.record(report)
        if report.refused is not None:
            self.error('chunk', f'chunk refused: {report.refused}')
        if report.late or report.too_late:
            self.warn('deadline', f'deadline missed: chunk of age {report.age_s:.3f} s')
        if report.over_budget_s is not None:
            self.warn(
                'budget',
                f'latency_budget_s exceeded: the p95 latency is {report.over_budget_s:.3f} s at '
                'the highest sparsity that the bundle recommends',
            )
        self._chunk_stats.publish(String(data=json.dumps(chunk_report(report))))
        if self._plan_image.get_subscription_count() > 0:
            image = plan_image(report.chunk.plan, report.tick.scheduled.stamp_ns)
            self._plan_image.publish(image)

    def look_at_input(self, worker: InferenceWorker, max_age_s: float) -> None:
        """Report input that is stale or makes no window; to be called while active."""
        _, stale, waiting_for = worker.inspect()
        if stale and time.monotonic() - self._active_since_s > DISCOVERY_S + max_age_s:
            self.error('stale', f'no chunk: {"; ".join(stale)}')
        if worker.clock_ahead_s > CLOCK_AHEAD_S:
            self.warn(
                'clock',
                'clock: expected stamps of sensors that are not ahead, got '
                f'{worker.clock_ahead_s:.3f} s; ages and commands are timed by the sensors',
            )
        self._waits = self._waits + 1 if waiting_for else 0
        if not stale and self._waits >= WAITS_BEFORE_WARNING:
            self.warn('window', f'no chunk: {waiting_for}')

    def publish(
        self,
        state: str,
        hardware_id: str,
        now_ns: int,
        values: Mapping[str, Any],
        worker: InferenceWorker | None,
    ) -> None:
        """Publish one report."""
        faults = self._faults.current()
        if self.failure is not None:
            faults.insert(0, (ERROR, self.failure))
        table = dict(values)
        ages: dict[str, float | None] = {}
        if worker is not None:
            ages, _, _ = worker.inspect()
            with self._lock:
                table |= self._statistics.values()
            table['discarded_chunks'] = worker.discarded
            table['clock_ahead_s'] = round(worker.clock_ahead_s, 4)
        self._publisher.publish(
            status_report(
                node_name=self._node.get_fully_qualified_name().lstrip('/'),
                hardware_id=hardware_id,
                now_ns=now_ns,
                state=state,
                faults=faults,
                ages_s=ages,
                values=table,
            )
        )


class Faults:
    """The last reason per subject, forgotten some seconds after it was last raised.

    May be used from several threads.
    """

    # Longer than the pause between reports and the one between two looks at the input.
    HOLD_S = 1.5
    SAY_AGAIN_S = 5.0

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[str, _Fault] = {}

    def raise_(self, level: bytes, subject: str, reason: str) -> bool:
        """Report a reason; True when it is time to log it (new, or not said for a while)."""
        now_s = time.monotonic()
        with self._lock:
            before = self._seen.get(subject)
            say = (
                before is None
                or before.level != level
                or now_s - before.said_s >= self.SAY_AGAIN_S
            )
            said_s = now_s if say or before is None else before.said_s
            self._seen[subject] = _Fault(level, reason, now_s, said_s)
        return say

    def current(self) -> list[tuple[bytes, str]]:
        """Levels and reasons not yet forgotten, the worst first."""
        oldest_s = time.monotonic() - self.HOLD_S
        with self._lock:
            self._seen = {k: fault for k, fault in self._seen.items() if fault.seen_s >= oldest_s}
            faults = [(fault.level, fault.reason) for fault in self._seen.values()]
        return sorted(faults, key=lambda fault: fault[0], reverse=True)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._seen.clear()


@dataclass(frozen=True)
class _Fault:
    level: bytes
    reason: str
    seen_s: float
    said_s: float


@dataclass
class TickStatistics:
    """Totals since configure, and latencies, ages and jumps of the last 256 ticks.

    A chunk that came too late to be sent counts as a missed deadline too.
    """

    ticks: int = 0
    deadline_misses: int = 0
    deadline_misses_wall: int = 0
    skipped_ticks: int = 0
    refused_chunks: int = 0
    refused_messages: Counter[str] = field(default_factory=Counter)
    resets: Counter[str] = field(default_factory=Counter)
    last: ChunkStats | None = None
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=256))
    ages_s: deque[float] = field(default_factory=lambda: deque(maxlen=256))
    jumps: deque[tuple[float, float, float]] = field(default_factory=lambda: deque(maxlen=256))

    def record(self, report: TickReport) -> None:
        """Count one tick and what became of its chunk."""
        self.ticks += 1
        self.deadline_misses += report.late or report.too_late
        self.deadline_misses_wall += report.late_wall
        self.refused_chunks += report.refused is not None
        self.skipped_ticks += report.tick.scheduled.skipped
        self.ages_s.append(report.age_s)
        self.latencies_s.append(report.latency_s)
        if report.sent is not None:
            self.jumps.append(astuple(report.sent.continuity))
        self.last = report.chunk.stats

    def values(self) -> dict[str, Any]:
        """Flat table for a report."""
        table: dict[str, Any] = {
            'ticks': self.ticks,
            **_percentiles('latency', self.latencies_s),
            **_percentiles('publishing_age', self.ages_s),
            'deadline_misses': self.deadline_misses,
            'deadline_misses_wall': self.deadline_misses_wall,
            'skipped_ticks': self.skipped_ticks,
            'refused_chunks': self.refused_chunks,
            'resets': sum(self.resets.values()),
            **{f'resets: {reason}': n for reason, n in self.resets.items()},
            **{f'refused messages: {topic}': n for topic, n in self.refused_messages.items()},
        }
        if self.jumps:
            for name, largest in zip(_JUMPS, np.max(self.jumps, axis=0), strict=True):
                table[f'{name}_max'] = f'{largest:.4g}'
        if self.last is not None:
            table['realised_sparsity'] = round(self.last.sparsity, 4)
            table['flops'] = int(self.last.flops)
            table['dense_flops'] = int(self.last.dense_flops)
            table['oldest_rollout_ticks'] = self.last.oldest_rollout_ticks
            for name, share in self.last.reuse_mix.items():
                table[f'reuse_mix {name}'] = round(share, 4)
        return table


_JUMPS = ('jump', 'velocity_jump', 'jerk')


def _percentiles(name: str, values_s: deque[float]) -> dict[str, float]:
    """p50, p95 and p99 in milliseconds, NaN before the first value."""
    values = np.full(3, math.nan)
    if values_s:
        values = np.percentile(np.array(values_s) * 1e3, [50, 95, 99])
    labels = ('p50', 'p95', 'p99')
    return {f'{name}_{p}_ms': round(ms, 2) for p, ms in zip(labels, values.tolist(), strict=True)}


def status_report(
    *,
    node_name: str,
    hardware_id: str,
    now_ns: int,
    state: str,
    faults: list[tuple[bytes, str]],
    ages_s: Mapping[str, float | None],
    values: Mapping[str, Any],
) -> DiagnosticArray:
    """One status: the worst level, every reason in the message, all values as text."""
    ages = {
        f'observation_age_s {key}': 'never' if age is None else f'{age:.3f}'
        for key, age in ages_s.items()
    }
    status = DiagnosticStatus(
        level=max((level for level, _ in faults), default=OK),
        name=f'{node_name}: policy',
        message='; '.join(reason for _, reason in faults) or state,
        hardware_id=hardware_id,
        values=[
            KeyValue(key=str(key), value=str(value))
            for key, value in {'state': state, **values, **ages}.items()
        ],
    )
    message = DiagnosticArray(status=[status])
    message.header.stamp = ns_to_time(now_ns)
    return message


def chunk_report(report: TickReport) -> dict[str, Any]:
    """One tick as plain containers for JSON; times in seconds, plan as K lists of N classes.

    blocks: symbol of the kind and decoder layer (from 0) of each of the N residual blocks, and the
    names of the symbols. deadline_miss: the chunk came after the next tick's observation was due
    (ROS clock); deadline_miss_wall: its wall latency is above the replan interval.
    """
    tick, stats, sent = report.tick, report.chunk.stats, report.sent
    trajectory = None if sent is None else sent.trajectory
    return {
        'stamp_ns': tick.scheduled.stamp_ns,
        'requested_sparsity': tick.sparsity,
        'sparsity': stats.sparsity,
        'flops': int(stats.flops),
        'dense_flops': int(stats.dense_flops),
        'latency_s': report.latency_s,
        'inference_s': stats.latency_s,
        'observation_age_s': report.age_s,
        'stages': dict(stats.stages_s),
        'reuse_mix': dict(stats.reuse_mix),
        'oldest_rollout_ticks': stats.oldest_rollout_ticks,
        'deadline_miss': report.late,
        'deadline_miss_wall': report.late_wall,
        'skipped_ticks': tick.scheduled.skipped,
        'reset': tick.scheduled.reset,
        'points': 0 if trajectory is None else len(trajectory.times_ns),
        'dropped_points': 0 if trajectory is None else trajectory.dropped,
        'continuity': None if sent is None else asdict(sent.continuity),
        'refused': report.refused,
        'blocks': blocks_report(report.chunk.blocks),
        'plan': np.asarray(report.chunk.plan).tolist(),
    }


def blocks_report(stack: BlockStack) -> dict[str, Any]:
    """What the columns of a plan stand for, as plain containers."""
    return {
        'symbols': [block.kind.symbol for block in stack.blocks],
        'layers': [block.layer for block in stack.blocks],
        'kinds': {kind.symbol: kind.name for kind in stack.distinct_kinds},
    }
