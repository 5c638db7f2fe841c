# SPDX-License-Identifier: Apache-2.0
"""What the node reports about itself."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')

from tts_policy.control.ticks import ScheduledTick
from tts_policy.node import monitor
from tts_policy.node.monitor import Faults, TickStatistics, chunk_report, status_report
from tts_policy.node.tick_report import Tick, TickReport
from tts_policy.policy.denoisers.blocks import FEED_FORWARD, SELF_ATTENTION, BlockSpec, BlockStack

INTERVAL_NS = 400_000_000


def report(
    latency_s: float = 0.02, age_ns: int = 30_000_000, skipped: int = 0, refused: str | None = None
) -> TickReport:
    stats = SimpleNamespace(
        sparsity=0.8,
        flops=10,
        dense_flops=50,
        latency_s=0.01,
        stages_s={'pruner': 0.001},
        reuse_mix={'COMPUTE': 0.2, 'ROLLOUT': 0.8},
        oldest_rollout_ticks=3,
    )
    stack = BlockStack((BlockSpec(SELF_ATTENTION, 0, 5), BlockSpec(FEED_FORWARD, 0, 20)))
    plan = np.array([[0, 3], [1, 2]], np.int8)
    chunk = SimpleNamespace(stats=stats, plan=plan, blocks=stack)
    tick = Tick(ScheduledTick(7, {}, None, 0, skipped), 0.8, INTERVAL_NS, 0, 0.0)
    return TickReport(tick, chunk, 7 + age_ns, latency_s, None, refused)  # type: ignore[arg-type]


def test_statistics_give_percentiles_and_totals() -> None:
    statistics = TickStatistics()
    assert 'realised_sparsity' not in statistics.values()
    for ms in range(1, 101):
        statistics.record(report(ms * 1e-3))
    statistics.record(report(0.5, age_ns=INTERVAL_NS + 1, skipped=2))
    values = statistics.values()
    assert values['ticks'] == 101
    assert values['latency_p50_ms'] == 51.0
    assert values['latency_p95_ms'] == 96.0
    assert values['deadline_misses'] == values['deadline_misses_wall'] == 1
    assert values['skipped_ticks'] == 2
    assert values['reuse_mix ROLLOUT'] == 0.8
    assert values['oldest_rollout_ticks'] == 3


def test_report_has_the_worst_level_and_every_reason() -> None:
    faults = Faults()
    assert faults.raise_(monitor.WARN, 'deadline', 'deadline missed')
    assert faults.raise_(monitor.ERROR, 'camera', 'camera: nothing for 1.0 s')
    assert not faults.raise_(monitor.ERROR, 'camera', 'camera: nothing for 1.1 s')
    message = status_report(
        node_name='tts_policy',
        hardware_id='bundle',
        now_ns=1_500_000_000,
        state='active',
        faults=faults.current(),
        ages_s={'camera': 1.1, 'joints': None},
        values={'ticks': 3},
    )
    (status,) = message.status
    assert status.level == monitor.ERROR
    assert status.message == 'camera: nothing for 1.1 s; deadline missed'
    values = {pair.key: pair.value for pair in status.values}
    assert values == {
        'state': 'active',
        'ticks': '3',
        'observation_age_s camera': '1.100',
        'observation_age_s joints': 'never',
    }
    assert message.header.stamp.nanosec == 500_000_000


def test_faults_are_forgotten_when_they_are_not_raised_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = [100.0]
    monkeypatch.setattr(monitor.time, 'monotonic', lambda: now_s[0])
    faults = Faults()
    faults.raise_(monitor.ERROR, 'camera', 'gone')
    now_s[0] += Faults.HOLD_S
    assert faults.current() == [(monitor.ERROR, 'gone')]
    now_s[0] += 0.01
    assert faults.current() == []


def test_chunk_report_survives_json() -> None:
    got = json.loads(json.dumps(chunk_report(report(refused='too fast'))))
    assert got['plan'] == [[0, 3], [1, 2]]
    assert got['blocks'] == {
        'symbols': ['SA', 'FF'],
        'layers': [0, 0],
        'kinds': {'SA': 'self-attention', 'FF': 'feed-forward'},
    }
    assert got['refused'] == 'too fast'
    assert got['points'] == 0
    assert got['observation_age_s'] == pytest.approx(0.03)
    assert got['deadline_miss'] is False
