# SPDX-License-Identifier: Apache-2.0
"""The variants of the policy that the demo compares, and the numbers and the table of each.

The demo process only drives and draws. It reads the few facts it needs from the bundle's
model.yaml without loading weights, and thus without torch; the policy node validates the bundle.

Steady state leaves out the first tick of an episode, which is dense in every variant. A share of
FLOPs is relative to the same sampler run dense; the FLOPs themselves compare samplers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from tts_policy.policy.contract import PolicyContract
from tts_policy.sim.demo.processes import DemoError

if TYPE_CHECKING:
    from tts_policy.sim.demo.driver import EpisodeRecord

DENSE_SAMPLER = 'ddpm100'


@dataclass(frozen=True)
class Sampler:
    """A sampler of the bundle; `label` is how people call it, for instance DDIM-10."""

    name: str
    label: str
    steps: int
    recommended_sparsity: float


@dataclass(frozen=True)
class Variant:
    """One way to run the policy, and how often; `key` names it in summary.json."""

    key: str
    sampler: Sampler
    sparsity: float
    episodes: int

    @property
    def title(self) -> str:
        """Name for tables and pictures."""
        if self.sparsity == 0.0:
            return f'dense {self.sampler.label}'
        return f'sparse {self.sampler.label} at {100 * self.sparsity:g} %'


@dataclass(frozen=True)
class DemoBundle:
    """The facts of a bundle that the demo needs."""

    path: Path
    contract: PolicyContract
    samplers: dict[str, Sampler]

    @property
    def deadline_s(self) -> float:
        """Time from one tick to the next, by which a chunk has to be there."""
        return self.contract.action.execute * self.contract.observation.period_s

    def deadlines(self, duration_s: float) -> int:
        """How many deadlines pass in an episode on the real clock."""
        observation = self.contract.observation
        first_tick_s = (observation.steps - 1) * observation.period_s
        return max(0, int((duration_s - first_tick_s + 1e-6) / self.deadline_s))

    def sampler(self, name: str) -> Sampler:
        """Sampler of that name; raises DemoError naming those there are."""
        if name not in self.samplers:
            raise DemoError(f'sampler: expected one of {list(self.samplers)}, got {name!r}')
        return self.samplers[name]


def read_bundle(path: Path) -> DemoBundle:
    """Read model.yaml; raises DemoError naming the file and the reason."""
    file = path / 'model.yaml'
    if not file.is_file():
        raise DemoError(f'bundle: expected {file}, got nothing')
    try:
        data = yaml.safe_load(file.read_text(encoding='utf-8'))
        samplers = {name: _sampler(name, entry) for name, entry in data['samplers'].items()}
        return DemoBundle(path, PolicyContract.from_dict(data), samplers)
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ) as error:
        reason = ' '.join(str(error).split())
        raise DemoError(f'{file}: {type(error).__name__}: {reason}') from error


def _sampler(name: str, entry: dict[str, Any]) -> Sampler:
    steps = int(entry['scheduler']['steps'])
    label = f'{str(entry["scheduler"]["kind"]).upper()}-{steps}'
    recommended = float(entry['recommended_sparsity']) if 'pruner' in entry else 0.0
    return Sampler(name, label, steps, recommended)


def choose_variants(
    bundle: DemoBundle, sampler: str, sparsity: float | None, episodes: int, dense_episodes: int
) -> list[Variant]:
    """Variants in the order in which they run; raises DemoError if the bundle cannot run them.

    The third one needs no start of its own: it is the dense node with its sparsity raised live.
    """
    sparse, dense = bundle.sampler(sampler), bundle.sampler(DENSE_SAMPLER)
    value = sparse.recommended_sparsity if sparsity is None else sparsity
    limit = 1.0 - 1.0 / sparse.steps
    if not 0.0 < value <= limit + 1e-9:
        raise DemoError(
            f'sparsity: expected above 0 and at most {limit:g} (1 - 1/{sparse.steps} steps) for '
            f'{sampler!r}, got {value:g}'
        )
    if episodes < 1 or dense_episodes < 1:
        raise DemoError(
            f'episodes, dense-episodes: expected at least 1, got {episodes}, {dense_episodes}'
        )
    variants = [
        Variant('sparse', sparse, value, episodes),
        Variant('dense', dense, 0.0, dense_episodes),
    ]
    if dense.recommended_sparsity > 0.0 and dense.name != sparse.name:
        variants.append(Variant(f'sparse_{dense.name}', dense, dense.recommended_sparsity, 1))
    return variants


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
    variant: Variant, records: Sequence[EpisodeRecord], bundle: DemoBundle, realtime: bool
) -> dict[str, Any]:
    """One variant's entry of summary.json; a number is null where no tick gives it."""
    ticks = [tick for record in records for tick in record.ticks]
    steady = [tick for record in records for tick in record.ticks[1:]]
    latency_ms = [1e3 * tick['latency_s'] for tick in ticks]
    deadlines, missed = _deadlines(records, bundle, realtime)

    def flops_ratio(of: list[dict[str, Any]]) -> float | None:
        return _mean([tick['flops'] / tick['dense_flops'] for tick in of])

    return {
        'sampler': variant.sampler.name,
        'requested_sparsity': variant.sparsity,
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


def _row(variant: Variant, summary: dict[str, Any]) -> list[str]:
    latency = summary['latency_ms']
    return [
        variant.title,
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


def table(variants: Sequence[Variant], summaries: Sequence[dict[str, Any]]) -> str:
    """Text table, one row per variant."""
    rows = [_row(variant, summary) for variant, summary in zip(variants, summaries, strict=True)]
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
    variants: Sequence[Variant],
    summaries: Sequence[dict[str, Any]],
    deadline_s: float,
    realtime: bool,
) -> str:
    """Say how many deadlines every variant missed on this machine."""
    clock = 'on the real clock' if realtime else 'by wall time (in lockstep the robot waits)'
    lines = [
        f'Deadlines missed on this machine, a chunk every {1e3 * deadline_s:.0f} ms, {clock}:'
    ]
    width = max(len(variant.title) for variant in variants)
    for variant, summary in zip(variants, summaries, strict=True):
        missed, deadlines = summary['deadline_misses'], summary['deadlines']
        lines.append(f'  {variant.title:{width}}  {missed} of {deadlines}')
    return '\n'.join(lines)
