# SPDX-License-Identifier: Apache-2.0
"""From measurements to rows, and to results.json and results.csv.

A row holds costs, success with its interval, and a paired test against the dense reference. Steady
state leaves out the dense first tick of every episode; the average over the episode includes it.
GFLOPs count the conditional encoder, the pruner and the executed decoder blocks.
"""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest, norm

from tts_policy.evaluate.variants import VARIANT_SETS, Variant
from tts_policy.sim.tasks import TASKS

# Standard normal quantile of a two-sided 95 % interval.
Z95 = float(norm.ppf(0.975))
Episodes = Mapping[int, dict[str, Any]]
Key = tuple[str, str, int | None]
Row = dict[str, Any]


class EvaluationError(ValueError):
    """An evaluation that cannot be run; the message says in one line what was expected."""


def wilson_interval(successes: int, episodes: int) -> tuple[float, float]:
    """95 % Wilson score interval of a success rate."""
    interval = binomtest(successes, episodes).proportion_ci(method='wilson')
    return float(interval.low), float(interval.high)


def mcnemar_exact(won: int, lost: int) -> float:
    """Two-sided p value of McNemar's exact test, which is a binomial one on discordant pairs."""
    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def paired_difference(won: int, lost: int, pairs: int) -> tuple[float, float]:
    """95 % interval of the difference of paired rates (Bonett and Price 2012, adjusted Wald)."""
    gained, dropped = (won + 1) / (pairs + 2), (lost + 1) / (pairs + 2)
    difference = gained - dropped
    spread = Z95 * math.sqrt((gained + dropped - difference**2) / (pairs + 2))
    return max(-1.0, difference - spread), min(1.0, difference + spread)


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


def make_row(task: str, variant: Variant, episodes: Episodes, l1_error: float | None) -> Row:
    """Row of one variant, before it is compared with its reference."""
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
    """Row whose latencies are replaced by those [ms] measured in turns with other variants."""
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
    seeds = row_seeds(row) & row_seeds(reference)
    if not seeds:
        return row
    failed, reference_failed = (set(one['failed_seeds']) & seeds for one in (row, reference))
    won, lost = len(reference_failed - failed), len(failed - reference_failed)
    row['p_value'] = round(mcnemar_exact(won, lost), 5)
    row['paired'] = {
        'reference': reference['variant'],
        'episodes': len(seeds),
        'won': won,
        'lost': lost,
        'difference_ci95': [round(b, 4) for b in paired_difference(won, lost, len(seeds))],
    }
    return row


def collect_rows(done: Mapping[Key, dict[str, Any]], earlier: Sequence[Row] = ()) -> list[Row]:
    """Rows of everything measured, in the order of earlier tasks and of the set of all variants.

    An earlier row stands until all of its seeds, or more episodes than it has, are in the log.
    """
    episodes: dict[tuple[str, str], dict[int, dict[str, Any]]] = defaultdict(dict)
    errors: dict[tuple[str, str], float | None] = {}
    for (task, name, seed), record in done.items():
        if seed is None:
            errors[task, name] = record['l1_error']
        else:
            episodes[task, name][seed] = record
    rows = {(row['task'], row['variant']): row for row in earlier}
    for (task, name), of in episodes.items():
        row = rows.get((task, name))
        if row is None or set(of) >= row_seeds(row) or len(of) > row['episodes']:
            rows[task, name] = make_row(task, Variant.parse(name), of, errors.get((task, name)))
    rank = {name: index for index, name in enumerate(VARIANT_SETS['all'])}
    tasks = list(dict.fromkeys([*(row['task'] for row in earlier), *TASKS]))
    order = sorted(rows, key=lambda e: (tasks.index(e[0]), rank.get(e[1], len(rank)), e[1]))
    return [
        compared(rows[task, name], rows.get((task, Variant.parse(name).reference)))
        for task, name in order
    ]


def read_rows(path: Path) -> list[Row]:
    """Rows of a results.json.

    Raises
    ------
    EvaluationError
        if there is none, or its rows do not say what they were measured with.

    """
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise EvaluationError(f'{path}: expected a results.json, got {error}') from None
    needed = {'task', 'variant', 'digest', 'episodes', 'seed_runs', 'failed_seeds'}
    if not isinstance(rows, list):
        raise EvaluationError(f'{path}: expected a list of rows, got {type(rows).__name__}')
    for row in rows:
        found = set(row) if isinstance(row, dict) else set()
        if not needed <= found:
            raise EvaluationError(
                f'{path}: expected rows with {sorted(needed)}, got {sorted(found)}'
            )
        if row['task'] not in TASKS:
            raise EvaluationError(f'{path}: expected tasks of {list(TASKS)}, got {row["task"]!r}')
    return rows


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
