# SPDX-License-Identifier: Apache-2.0
"""`evaluate_policy`: success against cost of a policy and of its alternatives.

All variants of a task run headless on the same seeds, distributed over processes, with the same
noise. Every measurement is appended to OUT/episodes.jsonl at once. An interrupted run, or one with
more episodes, variants or tasks, runs only what is missing. Rows of an earlier results.json
(--earlier) are kept where the bundle still gives the same digest. Finally results.json, .csv, .md
and pareto.png are written from all measurements.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tts_policy.data.worker_processes import worker_processes
from tts_policy.evaluate.digest import ExpectedDigests
from tts_policy.evaluate.page import markdown_table, write_page, write_plot
from tts_policy.evaluate.results import (
    EvaluationError,
    Key,
    Row,
    collect_rows,
    read_rows,
    row_seeds,
    timed,
    write_rows,
)
from tts_policy.evaluate.variants import (
    LEARNED_PLANS,
    VARIANT_SETS,
    Setting,
    Variant,
    VariantError,
    parse_variants,
)
from tts_policy.evaluate.worker import (
    Job,
    Worker,
    processor,
    run_job,
    start_worker,
    stop_worker,
)
from tts_policy.policy.bundle import Bundle, BundleError, load_bundle
from tts_policy.sim.task import EXPERT_SEED, TaskError
from tts_policy.sim.tasks import TASKS, task_named

FIRST_SEED = 100_000
INTERRUPTED = 130


def read_log(path: Path) -> list[dict[str, Any]]:
    """Measurements of earlier runs, without a line that a crash has cut short."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _matching(
    measured: list[dict[str, Any]], expected: ExpectedDigests, where: Path
) -> list[dict[str, Any]]:
    """Measurements of the present bundles; prints how many belong to others."""
    matching = expected.matching(measured)
    if len(matching) < len(measured):
        others = len(measured) - len(matching)
        print(f'{where}: left out {others} measurements of other bundles', file=sys.stderr)
    return matching


def _why_not(variant: Variant, setting: Setting, bundle: Bundle) -> str:
    """Why the bundle cannot run the variant; empty if it can."""
    contract = bundle.network.contract
    if not 1 <= setting.execute <= contract.usable_actions:
        usable = f'in [1, {contract.usable_actions}]'
        raise EvaluationError(f'{variant.name}: execute: expected {usable}, got {setting.execute}')
    if variant.asked_sparsity > setting.sampler.max_sparsity + 1e-9:
        most = f'at most {setting.sampler.max_sparsity:.4g}'
        return f'sparsity: expected {most}, got {variant.asked_sparsity:.4g}'
    if setting.blind and not contract.observation.cameras:
        return 'expected a policy with a camera, got one without'
    if variant.plan in LEARNED_PLANS and variant.pruner(bundle) is None:
        return f'expected a bundle with a pruner for {variant.sampler!r}, got none'
    return ''


def runnable(task: str, variants: Sequence[Variant], bundle: Bundle) -> list[Variant]:
    """Variants that the bundle can run, each once; prints which are left out, and why."""
    task_named(task).check(bundle.network.contract)
    able: dict[tuple[object, ...], Variant] = {}
    for variant in variants:
        setting = variant.setting(bundle)
        reason = _why_not(variant, setting, bundle)
        if not reason:
            made = variant.made_plan(bundle), variant.asked_sparsity, setting
            same = able.setdefault(made, variant)
            reason = '' if same is variant else f'with this bundle it is {same.name}'
        if reason:
            print(f'{task}: left out {variant.name}: {reason}', file=sys.stderr)
    return list(able.values())


def plan_jobs(
    variants: Mapping[str, Sequence[Variant]],
    seeds: Sequence[int],
    done: Mapping[Key, Any],
    earlier: Sequence[Row] = (),
) -> list[Job]:
    """Jobs still to be done, by task and variant; a variant's action error comes first."""
    covered = {(row['task'], row['variant']) for row in earlier if set(seeds) <= row_seeds(row)}
    jobs = [
        Job(task, variant, seed)
        for task, of in variants.items()
        for variant in of
        if (task, variant.name) not in covered
        for seed in ((None, *seeds) if variant.plan else seeds)
    ]
    return [job for job in jobs if job.key not in done]


def _run(
    jobs: Sequence[Job], bundles: dict[str, Path], args: argparse.Namespace, log: Path
) -> dict[Key, dict[str, Any]]:
    """Run the jobs over processes and log what they measure."""
    measured: dict[Key, dict[str, Any]] = {}
    if log.exists() and not log.read_text().endswith('\n'):
        with log.open('a') as handle:
            handle.write('\n')
    workers, setup = min(args.workers, len(jobs)), (bundles, args.sequences)
    with (
        ExitStack() as stack,
        log.open('a') as handle,
        tqdm(total=len(jobs), unit='run', mininterval=5) as bar,
    ):
        records: Iterator[dict[str, Any]]
        if workers == 1:
            start_worker(*setup)
            stack.callback(stop_worker)
            records = map(run_job, jobs)
        else:
            pool = stack.enter_context(worker_processes(workers, start_worker, setup))
            futures = [pool.submit(run_job, job) for job in jobs]
            records = (future.result() for future in as_completed(futures))
        for record in records:
            measured[record['task'], record['variant'], record['seed']] = record
            handle.write(json.dumps(record) + '\n')
            handle.flush()
            bar.set_postfix_str(f'{record["task"]} {record["variant"]}', refresh=False)
            bar.update()
    return measured


def timed_in_turns(rows: Sequence[Row], bundles: dict[str, Path], episodes: int) -> list[Row]:
    """Rows with latencies of all variants of a task in turns, where the task has a bundle here."""
    latencies: dict[tuple[str, str], list[float]] = defaultdict(list)
    with closing(Worker(bundles, episodes)) as worker:
        for task in bundles:
            variants = [Variant.parse(row['variant']) for row in rows if row['task'] == task]
            ticks, title = worker.steady_ticks(task), f'{task}: {len(variants)} variants in turns'
            for turn in tqdm(worker.turns(task, variants), total=ticks, unit='tick', desc=title):
                for name, latency in turn.items():
                    latencies[task, name].append(latency)
    return [
        timed(row, latencies[row['task'], row['variant']], processor())
        if row['task'] in bundles
        else row
        for row in rows
    ]


def _task_bundle(text: str) -> tuple[str, Path]:
    name, _, bundle = text.partition('=')
    try:
        default = task_named(name).bundle
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name, Path(bundle) if bundle else default


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line of `evaluate_policy`."""
    parser = argparse.ArgumentParser(
        prog='evaluate_policy', description=(__doc__ or '').split('\n')[0]
    )
    parser.add_argument(
        'tasks',
        nargs='+',
        type=_task_bundle,
        metavar='TASK[=BUNDLE]',
        help=f'of {", ".join(TASKS)}; the bundle is the one in models/ if it is not named',
    )
    parser.add_argument(
        '--variants',
        nargs='+',
        default=['named'],
        metavar='VARIANT',
        help=f'{", ".join(VARIANT_SETS)}, or SCHEDULER[:PLAN:SPARSITY][+OPTION...], for instance '
        'ddpm100, dpm5, ddim10:learned:0.8, ddim10:static:0.8+forced (default: %(default)s)',
    )
    parser.add_argument('--episodes', type=int, default=50, help='of every variant (default: 50)')
    parser.add_argument('--seed', type=int, default=FIRST_SEED, help='first seed')
    parser.add_argument('--workers', type=int, default=os.cpu_count() or 1, help='processes')
    parser.add_argument(
        '--sequences', type=int, default=10, help='expert episodes for the action error'
    )
    parser.add_argument(
        '--latency',
        type=int,
        default=0,
        metavar='EPISODES',
        help='time all variants anew, in turns, on so many expert episodes; for an idle machine',
    )
    parser.add_argument(
        '--earlier',
        type=Path,
        metavar='RESULTS',
        help='results.json whose rows are taken over where the bundle still makes them',
    )
    parser.add_argument('--out', type=Path, required=True, help='folder of log and results')
    parser.add_argument('--list', action='store_true', help='print the variants and stop')
    return parser.parse_args(arguments)


def _evaluate(args: argparse.Namespace) -> int:
    if min(args.episodes, args.workers, args.sequences) < 1:
        counts = args.episodes, args.workers, args.sequences
        raise EvaluationError(f'episodes, workers, sequences: expected at least 1, got {counts}')
    if args.latency < 0:
        raise EvaluationError(f'latency: expected at least 0 episodes, got {args.latency}')
    if not FIRST_SEED <= args.seed <= EXPERT_SEED - args.episodes:
        raise EvaluationError(
            f'seeds: expected some in [{FIRST_SEED}, {EXPERT_SEED}), apart from demonstrations, '
            f'got {args.episodes} from {args.seed} on'
        )
    asked, bundles = parse_variants(args.variants), dict(args.tasks)
    if args.list:
        print('\n'.join(variant.name for variant in asked))
        return 0
    loaded = {task: load_bundle(path) for task, path in bundles.items()}
    variants = {task: runnable(task, asked, bundle) for task, bundle in loaded.items()}
    expected, log = ExpectedDigests(loaded), args.out / 'episodes.jsonl'
    earlier = [] if args.earlier is None else read_rows(args.earlier)
    earlier = _matching(earlier, expected, args.earlier)
    args.out.mkdir(parents=True, exist_ok=True)
    logged = _matching(read_log(log), expected, log)
    done = {(record['task'], record['variant'], record['seed']): record for record in logged}
    seeds = range(args.seed, args.seed + args.episodes)
    jobs = plan_jobs(variants, seeds, done, earlier)
    if jobs:
        done |= _run(jobs, bundles, args, log)
    rows = collect_rows(done, earlier)
    if not rows:
        raise EvaluationError('variants: expected at least one that the bundles can run, got none')
    if args.latency:
        rows = timed_in_turns(rows, bundles, args.latency)
    written = [*write_rows(rows, args.out), args.out / 'results.md', args.out / 'pareto.png']
    write_page(rows, args.out / 'results.md')
    write_plot(rows, args.out / 'pareto.png')
    for task in bundles:
        print(markdown_table([row for row in rows if row['task'] == task]))
    for path in written:
        print(f'wrote {path}')
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, write the results, print the tables; returns the exit status."""
    args = parse_arguments(arguments)
    try:
        return _evaluate(args)
    except (BundleError, TaskError, VariantError, EvaluationError, ChildProcessError) as error:
        print(f'evaluate_policy: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted; run the same command again to go on', file=sys.stderr)
        return INTERRUPTED


if __name__ == '__main__':
    sys.exit(main())
