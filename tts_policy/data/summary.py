# SPDX-License-Identifier: Apache-2.0
"""Errors and costs of an evaluation, tick by tick and summarised.

Errors are in the units of the joints (rad; m for a gripper's finger), over all set-points of a
chunk. The first tick of an episode is dense in every arm, so summaries leave it out wherever an
episode has more than that.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tts_policy.policy.plan import Reuse

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class WorstTick:
    """A tick that sparsity changed most, with its camera image; row counts all ticks."""

    row: int
    image: NDArray[np.uint8]


@dataclass(frozen=True)
class Ticks:
    """Metrics of n ticks under s sparsities; 1 + s counts the dense reference too.

    l1, maximum [n, s, A] against dense; recorded_l1, recorded_max [n, 1 + s, A] against the
    recorded future, NaN where there is none; the others [n, 1 + s] but mix [n, 1 + s, 4].
    """

    bag: NDArray[np.int64]
    stamp_ns: NDArray[np.int64]
    first: NDArray[np.bool_]
    l1: Floats
    maximum: Floats
    recorded_l1: Floats
    recorded_max: Floats
    sparsity: Floats
    flops: Floats
    dense_flops: Floats
    latency_s: Floats
    oldest_rollout_ticks: NDArray[np.int64]
    mix: Floats
    worst: list[WorstTick]

    def __len__(self) -> int:
        return len(self.stamp_ns)

    @property
    def since_reset(self) -> NDArray[np.int64]:
        """How many ticks of its episode came before each tick."""
        rows = np.arange(len(self))
        return rows - np.maximum.accumulate(np.where(self.first, rows, 0))

    @property
    def steady(self) -> NDArray[np.bool_]:
        """Ticks that summaries are made of."""
        return ~self.first if (~self.first).any() else np.ones(len(self), bool)


def segments(folder: Path) -> list[Path]:
    """Segment files of one bag, in the order of their ticks."""
    return sorted(folder.glob('e*.npz'))


def _over_points(values: Floats, recorded: bool) -> tuple[Floats, Floats]:
    """Mean and maximum over the set-points of a chunk, axis -2; NaN where none is known."""
    if not recorded:
        return values.mean(-2), values.max(-2)
    known = ~np.isnan(values)
    total = np.where(known, values, 0.0).sum(-2)
    count = known.sum(-2)
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    top = np.where(known, values, -np.inf).max(-2)
    return mean, np.where(count > 0, top, np.nan)


def read_ticks(folders: Sequence[Path], worst: int = 6) -> Ticks:
    """Read the segments of every bag; only metrics and the worst ticks' images are kept."""
    columns: dict[str, list[Any]] = {}
    candidates: list[tuple[float, WorstTick]] = []
    rows = 0
    for number, folder in enumerate(folders):
        for path in segments(folder):
            with np.load(path) as data:
                actions = data['actions']
                errors = np.abs(actions[:, 1:] - actions[:, :1])
                off = np.abs(actions - data['future'][:, None])
                found: dict[str, Any] = {
                    'bag': np.full(len(actions), number),
                    **dict(zip(('l1', 'maximum'), _over_points(errors, False), strict=True)),
                    **dict(
                        zip(('recorded_l1', 'recorded_max'), _over_points(off, True), strict=True)
                    ),
                }
                for name in ('stamp_ns', 'first', 'sparsity', 'flops', 'dense_flops', 'latency_s'):
                    found[name] = data[name]
                for name in ('oldest_rollout_ticks', 'mix'):
                    found[name] = data[name]
                scores = found['l1'].mean((1, 2))
                candidates += [
                    (float(scores[row]), WorstTick(rows + int(row), image))
                    for row, image in zip(data['worst_rows'], data['worst_images'], strict=True)
                ]
            candidates = sorted(candidates, key=lambda item: -item[0])[:worst]
            rows += len(actions)
            for name, value in found.items():
                columns.setdefault(name, []).append(value)
    if not columns:
        raise ValueError('results: expected ticks, got none')
    merged = {name: np.concatenate(values) for name, values in columns.items()}
    return Ticks(worst=[item for _, item in candidates], **merged)


def knee(sparsities: Sequence[float], p95: Sequence[float], tolerance: float) -> float | None:
    """Highest sparsity whose 95th-percentile error stays under the tolerance, None if none."""
    below = [s for s, error in zip(sparsities, p95, strict=True) if error < tolerance]
    return max(below, default=None)


def _number(value: Any) -> float | None:
    """JSON has no NaN."""
    return None if np.isnan(value) else float(value)


def _mean(values: Floats) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def summarise(
    ticks: Ticks, sparsities: Sequence[float], joints: Sequence[str], tolerance: float
) -> dict[str, Any]:
    """Contents of report.json but for bags and problems."""
    steady = ticks.steady
    per_tick = ticks.l1[steady].mean(-1)
    p95 = np.percentile(per_tick, 95, axis=0)
    max_p95 = np.percentile(ticks.maximum[steady].max(-1), 95, axis=0)
    ratios = ticks.flops / ticks.dense_flops
    rows = {}
    for at, sparsity in enumerate(sparsities):
        latency_ms = 1e3 * ticks.latency_s[steady, 1 + at]
        rows[str(float(sparsity))] = {
            'l1_mean_rad': float(per_tick[:, at].mean()),
            'l1_p95_rad': float(p95[at]),
            'max_rad': float(ticks.maximum[:, at].max()),
            'max_p95_rad': float(max_p95[at]),
            'flops_ratio': float(ratios[steady, 1 + at].mean()),
            'flops_ratio_episode': float(ratios[:, 1 + at].mean()),
            'latency_ms': float(np.median(latency_ms)),
            'latency_p95_ms': float(np.percentile(latency_ms, 95)),
            'realised_sparsity': float(ticks.sparsity[steady, 1 + at].mean()),
            'reuse_mix': {
                kind.name.lower(): float(ticks.mix[steady, 1 + at, kind].mean()) for kind in Reuse
            },
            'oldest_rollout_ticks': int(ticks.oldest_rollout_ticks[:, 1 + at].max()),
            'recorded_l1_rad': _mean(ticks.recorded_l1[:, 1 + at]),
            'joints': {
                name: {
                    'l1_mean': float(ticks.l1[steady, at, j].mean()),
                    'max': float(ticks.maximum[:, at, j].max()),
                    'recorded_l1': _mean(ticks.recorded_l1[:, 1 + at, j]),
                }
                for j, name in enumerate(joints)
            },
        }
    return {
        'ticks': len(ticks),
        'steady_ticks': int(steady.sum()),
        'tolerance_rad': tolerance,
        'knee': knee(sparsities, p95.tolist(), tolerance),
        'dense': {
            'recorded_l1_rad': _mean(ticks.recorded_l1[:, 0]),
            'latency_ms': float(1e3 * np.median(ticks.latency_s[:, 0])),
            'gflops': float(ticks.dense_flops[0, 0] / 1e9),
        },
        'sparsity': rows,
    }


def _csv_rows(
    ticks: Ticks, sparsities: Sequence[float], bags: Sequence[str]
) -> Iterator[list[Any]]:
    for n in range(len(ticks)):
        for at, sparsity in enumerate(sparsities):
            yield [
                bags[ticks.bag[n]],
                int(ticks.stamp_ns[n]),
                int(ticks.first[n]),
                sparsity,
                float(ticks.l1[n, at].mean()),
                float(ticks.maximum[n, at].max()),
                _number(ticks.recorded_l1[n, 1 + at].mean()),
                float(ticks.sparsity[n, 1 + at]),
                int(ticks.flops[n, 1 + at]),
                1e3 * float(ticks.latency_s[n, 1 + at]),
                *(float(share) for share in ticks.mix[n, 1 + at]),
                int(ticks.oldest_rollout_ticks[n, 1 + at]),
                *ticks.l1[n, at].tolist(),
                *ticks.maximum[n, at].tolist(),
            ]


def write_csv(
    path: Path,
    ticks: Ticks,
    sparsities: Sequence[float],
    bags: Sequence[str],
    joints: Sequence[str],
) -> None:
    """One row per tick and sparsity."""
    header = ['bag', 'stamp_ns', 'first_of_episode', 'requested_sparsity', 'l1_rad', 'max_rad']
    header += ['recorded_l1_rad', 'sparsity', 'flops', 'latency_ms']
    header += [f'share_{kind.name.lower()}' for kind in Reuse] + ['oldest_rollout_ticks']
    header += [f'l1_{name}' for name in joints] + [f'max_{name}' for name in joints]
    with path.open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(_csv_rows(ticks, sparsities, bags))


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write whole or not at all."""
    partial = path.with_suffix('.tmp')
    partial.write_text(json.dumps(report, indent=2) + '\n')
    partial.replace(path)
