# SPDX-License-Identifier: Apache-2.0
"""The demo's numbers: episodes of an arm to one summary, summaries to a table.

Steady state leaves out the first tick of an episode, which is dense in every arm. A share of
FLOPs is against the same sampler run dense; to compare samplers there are the FLOPs themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tts_policy.sim.demo_arms import Arm, DemoBundle
from tts_policy.sim.demo_driver import EpisodeRecord


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None


def _deadlines(
    records: Sequence[EpisodeRecord], bundle: DemoBundle, realtime: bool
) -> tuple[int, int]:
    """How many deadlines there were and how many were missed.

    In lockstep, where the clock waits, every tick has one, missed if its wall latency was above
    the interval. On the real clock one comes every interval whether a chunk is ready or not:
    missed are those that no chunk met, also while the policy was busy with a late one.
    """
    count = missed = 0
    for record in records:
        ticks = len(record.ticks)
        name = 'deadline_miss' if realtime else 'deadline_miss_wall'
        late = sum(bool(tick[name]) for tick in record.ticks)
        whole = bundle.deadlines(record.report['duration_s']) if realtime else 0
        count += max(ticks, whole)
        missed += max(ticks, whole) - (ticks - late)
    return count, missed


def summarise(
    arm: Arm, records: Sequence[EpisodeRecord], bundle: DemoBundle, realtime: bool
) -> dict[str, Any]:
    """One arm's entry of summary.json; a number is null where no tick gives it."""
    ticks = [tick for record in records for tick in record.ticks]
    steady = [tick for record in records for tick in record.ticks[1:]]
    latency_ms = [1e3 * tick['latency_s'] for tick in ticks]
    deadlines, missed = _deadlines(records, bundle, realtime)

    def flops_ratio(of: list[dict[str, Any]]) -> float | None:
        return _mean([tick['flops'] / tick['dense_flops'] for tick in of])

    return {
        'sampler': arm.sampler.name,
        'requested_sparsity': arm.sparsity,
        'episodes': len(records),
        'successes': sum(record.success for record in records),
        'ticks': len(ticks),
        'latency_ms': {'p50': _percentile(latency_ms, 50), 'p95': _percentile(latency_ms, 95)},
        'sparsity': _mean([tick['sparsity'] for tick in steady or ticks]),
        'sparsity_all_ticks': _mean([tick['sparsity'] for tick in ticks]),
        'flops_ratio': flops_ratio(ticks),
        'flops_ratio_steady': flops_ratio(steady),
        'mflops_per_tick': _mean([1e-6 * tick['flops'] for tick in ticks]),
        'mflops_per_tick_steady': _mean([1e-6 * tick['flops'] for tick in steady]),
        'deadlines': deadlines,
        'deadline_misses': missed,
        'skipped_ticks': sum(tick['skipped_ticks'] for tick in ticks),
        'refused_chunks': sum(tick['refused'] is not None for tick in ticks),
        'per_episode': [
            {
                **record.report,
                'ticks': len(record.ticks),
                'latency_ms': [round(1e3 * tick['latency_s'], 2) for tick in record.ticks],
            }
            for record in records
        ],
    }


def _number(value: float | None, form: str, factor: float = 1.0) -> str:
    return '–' if value is None else format(factor * value, form)


def _row(arm: Arm, summary: dict[str, Any]) -> list[str]:
    latency = summary['latency_ms']
    return [
        arm.title,
        f'{summary["successes"]}/{summary["episodes"]}',
        str(summary['ticks']),
        _number(latency['p50'], '.0f'),
        _number(latency['p95'], '.0f'),
        _number(summary['sparsity'], '.1f', 100),
        _number(summary['flops_ratio_steady'], '.1f', 100),
        _number(summary['flops_ratio'], '.1f', 100),
        _number(summary['mflops_per_tick_steady'], '.0f'),
        f'{summary["deadline_misses"]}/{summary["deadlines"]}',
    ]


HEADER = (
    ('', '', '', 'latency', '', 'reused', 'FLOPs, % of dense', '', 'MFLOP', 'deadlines'),
    ('', 'success', 'ticks', 'p50 ms', 'p95 ms', '%', 'steady', 'all', 'a tick', 'missed'),
)


def table(arms: Sequence[Arm], summaries: Sequence[dict[str, Any]]) -> str:
    """Text table, one row per arm."""
    rows = [_row(arm, summary) for arm, summary in zip(arms, summaries, strict=True)]
    widths = [
        max(len(row[column]) for row in (HEADER[1], *rows)) for column in range(len(HEADER[1]))
    ]
    # A group's name spans its columns.
    widths[6] = max(widths[6], len(HEADER[0][6]) - widths[7] - 2)
    lines = []
    for row in (HEADER[1], *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append('  '.join(cells))
    groups = _group_line(widths)
    rule = '─' * len(lines[0])
    return '\n'.join((groups, lines[0], rule, *lines[1:], rule))


def _group_line(widths: Sequence[int]) -> str:
    """First line of the head: every group's name centred above the columns it spans."""
    spans = {3: 2, 5: 1, 6: 2, 8: 1, 9: 1}
    parts, column = [], 0
    while column < len(widths):
        span = spans.get(column, 1)
        width = sum(widths[column : column + span]) + 2 * (span - 1)
        parts.append(
            HEADER[0][column].rjust(width) if span == 1 else HEADER[0][column].center(width)
        )
        column += span
    return '  '.join(parts).rstrip()


def deadline_lines(
    arms: Sequence[Arm], summaries: Sequence[dict[str, Any]], deadline_s: float, realtime: bool
) -> str:
    """Say how many deadlines every arm missed on this machine."""
    clock = 'on the real clock' if realtime else 'by wall time (in lockstep the robot waits)'
    lines = [
        f'Deadlines missed on this machine, a chunk every {1e3 * deadline_s:.0f} ms, {clock}:'
    ]
    width = max(len(arm.title) for arm in arms)
    for arm, summary in zip(arms, summaries, strict=True):
        missed, deadlines = summary['deadline_misses'], summary['deadlines']
        lines.append(f'  {arm.title:{width}}  {missed} of {deadlines}')
    return '\n'.join(lines)
