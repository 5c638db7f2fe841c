# SPDX-License-Identifier: Apache-2.0
"""From measurements to rows: intervals, paired tests, costs, and the files made of them.

Steady state leaves out the dense first tick of every episode; the episode average has it. GFLOPs
are those of conditional encoder, pruner and executed decoder blocks.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tts_policy.evaluate.variants import Variant

Z95 = 1.959964
Episodes = Mapping[int, dict[str, Any]]
Row = dict[str, Any]


def wilson_interval(successes: int, episodes: int) -> tuple[float, float]:
    """95 % Wilson score interval of a success rate."""
    rate = successes / episodes
    centre = rate + Z95 * Z95 / (2 * episodes)
    spread = Z95 * math.sqrt(rate * (1 - rate) / episodes + Z95 * Z95 / (4 * episodes**2))
    scale = 1 + Z95 * Z95 / episodes
    return (centre - spread) / scale, (centre + spread) / scale


def discordant(variant: Row, reference: Row) -> tuple[int, int, int]:
    """Common seeds: those won by the variant alone, those by the reference alone, and all."""
    seeds = row_seeds(variant) & row_seeds(reference)
    failed, reference_failed = (set(row['failed_seeds']) & seeds for row in (variant, reference))
    return len(reference_failed - failed), len(failed - reference_failed), len(seeds)


def row_seeds(row: Row) -> set[int]:
    """Seeds that a row was measured on."""
    return {seed for first, count in row['seed_runs'] for seed in range(first, first + count)}


def _runs(seeds: Iterable[int]) -> list[list[int]]:
    """Ascending seeds as [first, count] of those that follow one another."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([seed, 1])
    return runs


def mcnemar_exact(won: int, lost: int) -> float:
    """Two-sided exact McNemar test: probability of so uneven a split of the discordant pairs."""
    pairs = won + lost
    tail = sum(math.comb(pairs, k) for k in range(min(won, lost) + 1)) / 2**pairs
    return min(1.0, 2 * tail)


def paired_difference(won: int, lost: int, pairs: int) -> tuple[float, float]:
    """95 % interval of the difference of paired rates (Bonett and Price 2012, adjusted Wald)."""
    gained, dropped = (won + 1) / (pairs + 2), (lost + 1) / (pairs + 2)
    difference = gained - dropped
    spread = Z95 * math.sqrt((gained + dropped - difference**2) / (pairs + 2))
    return max(-1.0, difference - spread), min(1.0, difference + spread)


def make_row(task: str, variant: Variant, episodes: Episodes, l1_error: float | None) -> Row:
    """Row of one variant, not compared with any other yet."""
    runs = [episodes[seed] for seed in sorted(episodes)]
    successes = sum(run['success'] for run in runs)

    def steady(key: str) -> list[float]:
        return [value for run in runs for value in run[key][1:] or run[key]]

    def every(key: str) -> list[float]:
        return [value for run in runs for value in run[key]]

    row: Row = {
        'task': task,
        'variant': variant.name,
        'scheduler': variant.scheduler,
        'steps': variant.steps,
        'sparsity': round(1 - float(np.mean(steady('fe'))) / variant.steps, 4),
        'episodes': len(runs),
        'successes': successes,
        'ci95': [round(bound, 4) for bound in wilson_interval(successes, len(runs))],
        'p_value': None,
        'l1_error': None if l1_error is None else round(l1_error, 4),
        'gflops_tick': round(float(np.mean(steady('gflops'))), 4),
        'fe_steady': round(float(np.mean(steady('fe'))), 3),
        'fe_episode': round(float(np.mean(every('fe'))), 3),
        **_percentiles(steady('latency_ms')),
        'gflops_tick_episode': round(float(np.mean(every('gflops'))), 4),
        'gflops_observation': runs[0]['observation_gflops'],
        'ticks_mean': round(float(np.mean([run['ticks'] for run in runs])), 2),
        'reuse_mix': {
            name: round(float(np.mean([run['mix'][name] for run in runs])), 4)
            for name in runs[0]['mix']
        },
        'oldest_rollout_ticks': max(run['oldest'] for run in runs),
        'device': ', '.join(sorted({run['device'] for run in runs})),
        'seed_runs': _runs(sorted(episodes)),
        'failed_seeds': [seed for seed in sorted(episodes) if not episodes[seed]['success']],
        'digest': runs[0]['digest'],
    }
    if 'score' in runs[0]:
        row['score'] = round(float(np.mean([run['score'] for run in runs])), 4)
    return row


def timed(row: Row, latencies: Sequence[float], device: str) -> Row:
    """Row with `latencies` [ms] of a variant in turns with others, for those of its episodes."""
    turns = {'ticks': len(latencies), 'device': device}
    return row | _percentiles(latencies) | {'latency_in_turns': turns}


def _percentiles(latencies: Sequence[float]) -> Row:
    return {
        'latency_ms': round(float(np.median(latencies)), 1),
        'latency_ms_p95': round(float(np.percentile(latencies, 95)), 1),
    }


def compared(row: Row, reference: Row | None) -> Row:
    """Row with its paired test against `reference`, the dense variant of the same task."""
    row = {name: value for name, value in row.items() if name != 'paired'} | {'p_value': None}
    if reference is None or row['variant'] == reference['variant']:
        return row
    won, lost, pairs = discordant(row, reference)
    if pairs:
        row['p_value'] = round(mcnemar_exact(won, lost), 5)
        row['paired'] = {
            'reference': reference['variant'],
            'episodes': pairs,
            'won': won,
            'lost': lost,
            'difference_ci95': [round(b, 4) for b in paired_difference(won, lost, pairs)],
        }
    return row


def write_rows(rows: Sequence[Row], out: Path) -> list[Path]:
    """Write results.json and results.csv; returns their paths."""
    paths = [out / f'results.{kind}' for kind in ('json', 'csv')]
    paths[0].write_text(json.dumps(list(rows), indent=1) + '\n')
    flat = [{k: v for k, v in row.items() if not isinstance(v, (dict, list))} for row in rows]
    for row, source in zip(flat, rows, strict=True):
        row['ci95_low'], row['ci95_high'] = source['ci95']
    with paths[1].open('w', newline='') as handle:
        writer = csv.DictWriter(handle, list(dict.fromkeys(key for row in flat for key in row)))
        writer.writeheader()
        writer.writerows(flat)
    return paths
