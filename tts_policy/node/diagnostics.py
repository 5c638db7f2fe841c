# SPDX-License-Identifier: Apache-2.0
"""What the node says about itself: rolling statistics of the ticks, and recent faults.

A fault stays in the report for `Faults.HOLD_S` seconds after it was last seen, so that a report
once a second shows it at least once. Latencies are wall clock; ages are of the ROS clock.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from dataclasses import asdict, astuple, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from tts_policy.node.messages import ns_to_time

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tts_policy.control.output import Sent
    from tts_policy.node.worker import Delivery
    from tts_policy.policy.denoisers.blocks import BlockStack
    from tts_policy.policy.policy import ChunkStats

OK = DiagnosticStatus.OK
WARN = DiagnosticStatus.WARN
ERROR = DiagnosticStatus.ERROR


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

    A chunk that came too late to be sent is a deadline miss as well; `late` is the ROS clock's.
    """

    ticks: int = 0
    deadline_misses: int = 0
    deadline_misses_wall: int = 0
    skipped_ticks: int = 0
    refused_chunks: int = 0
    discarded_chunks: int = 0
    refused_messages: Counter[str] = field(default_factory=Counter)
    resets: Counter[str] = field(default_factory=Counter)
    last: ChunkStats | None = None
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=256))
    ages_s: deque[float] = field(default_factory=lambda: deque(maxlen=256))
    jumps: deque[tuple[float, float, float]] = field(default_factory=lambda: deque(maxlen=256))

    def record(self, delivery: Delivery, sent: Sent | None, too_late: bool = False) -> None:
        """Count one tick whose chunk was delivered, and what was sent of it."""
        self.ticks += 1
        self.deadline_misses += delivery.late or too_late
        self.ages_s.append(delivery.age_s)
        if sent is not None:
            self.jumps.append(astuple(sent.continuity))
        self.deadline_misses_wall += delivery.late_wall
        self.skipped_ticks += delivery.tick.skipped
        self.last = delivery.chunk.stats
        self.latencies_s.append(delivery.latency_s)

    def age_p95_s(self) -> float | None:
        """p95 of the age of the newest observation at publishing; None until 20 ticks are in."""
        return float(np.percentile(self.ages_s, 95)) if len(self.ages_s) >= 20 else None

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
            'discarded_chunks': self.discarded_chunks,
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


def report(
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


def chunk_report(delivery: Delivery, sent: Sent | None, refused: str | None) -> dict[str, Any]:
    """One tick as plain containers for JSON; times in seconds, plan as K lists of N classes.

    `blocks`: kind's symbol and decoder layer (from 0) of the N residual blocks, names of symbols.

    `deadline_miss`: the chunk came after the next tick's observation was due (ROS clock);
    `deadline_miss_wall`: its wall latency is above the replan interval, whatever that clock did.
    """
    tick, stats = delivery.tick, delivery.chunk.stats
    trajectory = None if sent is None else sent.trajectory
    return {
        'stamp_ns': tick.stamp_ns,
        'requested_sparsity': tick.sparsity,
        'sparsity': stats.sparsity,
        'flops': int(stats.flops),
        'dense_flops': int(stats.dense_flops),
        'latency_s': delivery.latency_s,
        'inference_s': stats.latency_s,
        'observation_age_s': delivery.age_s,
        'stages': dict(stats.stages_s),
        'reuse_mix': dict(stats.reuse_mix),
        'oldest_rollout_ticks': stats.oldest_rollout_ticks,
        'deadline_miss': delivery.late,
        'deadline_miss_wall': delivery.late_wall,
        'skipped_ticks': tick.skipped,
        'reset': tick.reset,
        'points': 0 if trajectory is None else len(trajectory.times_ns),
        'dropped_points': 0 if trajectory is None else trajectory.dropped,
        'continuity': None if sent is None else asdict(sent.continuity),
        'refused': refused,
        'blocks': blocks_report(delivery.chunk.blocks),
        'plan': np.asarray(delivery.chunk.plan).tolist(),
    }


def blocks_report(stack: BlockStack) -> dict[str, Any]:
    """What the columns of a plan stand for, as plain containers."""
    return {
        'symbols': [block.kind.symbol for block in stack.blocks],
        'layers': [block.layer for block in stack.blocks],
        'kinds': {kind.symbol: kind.name for kind in stack.distinct_kinds},
    }
