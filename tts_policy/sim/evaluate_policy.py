# SPDX-License-Identifier: Apache-2.0
"""`evaluate_policy`: success against cost of a policy and of what one would run instead of it.

Every arm of a task runs the same seeds with the same noise, headless, over processes. Measurements
go to OUT/episodes.jsonl as they are made, and a run that was interrupted goes on from there; so
does one with more episodes, arms or tasks. Then results.json, .csv, .md and pareto.png are written
from all measurements that there are.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tts_policy.core.bundle import Bundle, BundleError, bundle_digest, load_bundle
from tts_policy.sim.benchmark import BENCHMARKS, EXPERT_SEED, benchmark_named
from tts_policy.sim.evaluation_arms import ARM_SETS, Arm, ArmError, parse_arms
from tts_policy.sim.evaluation_page import markdown_table, write_page, write_plot
from tts_policy.sim.evaluation_results import Row, make_row, write_rows
from tts_policy.sim.evaluation_worker import Job, run_job, start_worker
from tts_policy.worker_processes import worker_processes

FIRST_SEED = 100_000
INTERRUPTED = 130
Key = tuple[str, str, int | None]


class EvaluationError(ValueError):
    """A command line that cannot be run; the message says why in one line."""


def read_log(path: Path) -> dict[Key, dict[str, Any]]:
    """Measurements of earlier runs; a line cut short by a crash is left out."""
    done = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        done[record['task'], record['arm'], record['seed']] = record
    return done


def claim(out: Path, bundles: Mapping[str, Path]) -> None:
    """Note in OUT/bundles.json which bundles are measured there.

    Raises
    ------
    EvaluationError
        if OUT holds measurements of another bundle of a task: they must not be mixed.

    """
    path = out / 'bundles.json'
    known = json.loads(path.read_text()) if path.exists() else {}
    for task, bundle in bundles.items():
        digest = bundle_digest(bundle)
        if known.setdefault(task, digest) != digest:
            raise EvaluationError(
                f'{out}: measurements of {task} with the bundle of SHA-256 {known[task][:12]} '
                f'expected, got {digest[:12]}: name another --out'
            )
    path.write_text(json.dumps(known, indent=2) + '\n')


def runnable(task: str, arms: Sequence[Arm], bundle: Bundle) -> list[Arm]:
    """Arms that the bundle can run; says which it cannot, and why."""
    import torch

    benchmark_named(task).check(bundle.network.contract)
    able: list[Arm] = []
    known: dict[tuple[object, ...], Arm] = {}
    for arm in arms:
        try:
            setting = arm.setting(bundle)
            arm.plan_source(bundle, torch.zeros(1))
            if setting.blind and not bundle.network.contract.observation.cameras:
                raise BundleError(f'{arm.name}: the policy has no camera to deceive')
            usable = bundle.network.contract.usable_actions
            if not 1 <= setting.execute <= usable:
                raise EvaluationError(
                    f'{arm.name}: execute must be in [1, {usable}], got {setting.execute}'
                )
        except BundleError as error:
            print(f'{task}: left out, {error}', file=sys.stderr)
            continue
        if arm.asked_sparsity > setting.sampler.max_sparsity + 1e-9:
            print(
                f'{task}: left out, {arm.name}: sparsity must be at most '
                f'{setting.sampler.max_sparsity:.4g}',
                file=sys.stderr,
            )
            continue
        same = known.setdefault((arm.plan, arm.sparsity, setting), arm)
        if same is not arm:
            print(f'{task}: left out, {arm.name}: here it is {same.name}', file=sys.stderr)
            continue
        able.append(arm)
    return able


def plan_jobs(
    arms: Mapping[str, Sequence[Arm]], seeds: Sequence[int], done: Mapping[Key, Any]
) -> list[Job]:
    """Jobs still to be done: task by task, arm by arm, the action error of an arm first."""
    jobs = [
        Job(task, arm, seed)
        for task, of in arms.items()
        for arm in of
        for seed in ((None, *seeds) if arm.plan else seeds)
    ]
    return [job for job in jobs if job.key not in done]


def collect_rows(done: Mapping[Key, dict[str, Any]]) -> list[Row]:
    """Rows of everything measured: tasks as registered, arms as in the set of all of them."""
    episodes: dict[tuple[str, str], dict[int, dict[str, Any]]] = defaultdict(dict)
    errors: dict[tuple[str, str], float | None] = {}
    for (task, name, seed), record in done.items():
        if seed is None:
            errors[task, name] = record['l1_error']
        else:
            episodes[task, name][seed] = record
    rank = {name: index for index, name in enumerate(ARM_SETS['all'])}
    tasks = list(BENCHMARKS)
    order = sorted(episodes, key=lambda e: (tasks.index(e[0]), rank.get(e[1], len(rank)), e[1]))
    rows = []
    for task, name in order:
        arm = Arm.parse(name)
        reference = episodes.get((task, arm.reference))
        error = errors.get((task, name))
        rows.append(make_row(task, arm, episodes[task, name], reference, error))
    return rows


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
            records = map(run_job, jobs)
        else:
            pool = stack.enter_context(worker_processes(workers, start_worker, setup))
            futures = [pool.submit(run_job, job) for job in jobs]
            records = (future.result() for future in as_completed(futures))
        for record in records:
            measured[record['task'], record['arm'], record['seed']] = record
            handle.write(json.dumps(record) + '\n')
            handle.flush()
            bar.set_postfix_str(f'{record["task"]} {record["arm"]}', refresh=False)
            bar.update()
    return measured


def _task_bundle(text: str) -> tuple[str, Path]:
    name, _, bundle = text.partition('=')
    try:
        default = benchmark_named(name).bundle
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
        help=f'of {", ".join(BENCHMARKS)}; the bundle is the one in models/ if it is not named',
    )
    parser.add_argument(
        '--arms',
        nargs='+',
        default=['named'],
        metavar='ARM',
        help=f'{", ".join(ARM_SETS)}, or SCHEDULER[:PLAN:SPARSITY][+OPTION...] such as ddpm100, '
        'ddim10:learned:0.8, ddim10:static:0.8+forced (default: %(default)s)',
    )
    parser.add_argument('--episodes', type=int, default=50, help='of every arm (default: 50)')
    parser.add_argument('--seed', type=int, default=FIRST_SEED, help='first seed')
    parser.add_argument('--workers', type=int, default=os.cpu_count() or 1, help='processes')
    parser.add_argument(
        '--sequences', type=int, default=10, help='expert episodes for the action error'
    )
    parser.add_argument('--out', type=Path, required=True, help='folder of log and results')
    parser.add_argument('--list', action='store_true', help='print the arms and stop')
    return parser.parse_args(arguments)


def _evaluate(args: argparse.Namespace) -> int:
    if min(args.episodes, args.workers, args.sequences) < 1:
        raise EvaluationError('episodes, workers and sequences must be at least 1')
    if not FIRST_SEED <= args.seed <= EXPERT_SEED - args.episodes:
        raise EvaluationError(
            f'seeds must be in [{FIRST_SEED}, {EXPERT_SEED}), apart from those of demonstrations, '
            f'got {args.episodes} from {args.seed} on'
        )
    asked, bundles = parse_arms(args.arms), dict(args.tasks)
    if args.list:
        print('\n'.join(arm.name for arm in asked))
        return 0
    arms = {task: runnable(task, asked, load_bundle(path)) for task, path in bundles.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    claim(args.out, bundles)
    log = args.out / 'episodes.jsonl'
    done = read_log(log)
    jobs = plan_jobs(arms, range(args.seed, args.seed + args.episodes), done)
    if jobs:
        done |= _run(jobs, bundles, args, log)
    rows = collect_rows(done)
    if not rows:
        raise EvaluationError('no arm could be run')
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
    except (BundleError, ArmError, EvaluationError, ChildProcessError) as error:
        print(f'evaluate_policy: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted; run the same command again to go on', file=sys.stderr)
        return INTERRUPTED


if __name__ == '__main__':
    sys.exit(main())
