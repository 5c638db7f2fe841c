# SPDX-License-Identifier: Apache-2.0
"""Time of one action chunk: upstream's dense loop, ours, the sparse engine, the paper's ablation.

All arms run interleaved in one process, chunk by chunk, so that ratios are of the same machine in
the same minute. With --random the model has upstream's size and no observation encoder; with
--bundle the bundle's own encoder, pruners and recommended sparsities are timed. The first chunk of
a sampler is dense and belongs to the warm-up.

    .venv/bin/pip install -r requirements/bench.txt -c requirements/constraints.txt
    .venv/bin/python bench/latency.py --random --json out/latency.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import (
    Arm,
    Timing,
    bundle_model,
    make_arms,
    random_model,
    run_timed,
    scheduler_s,
)
from machine import describe_machine
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

MIN_CHUNKS = 200


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument('--bundle', type=Path, help='folder of a model bundle')
    model.add_argument('--random', action='store_true', help="random model of upstream's size")
    parser.add_argument(
        '--horizon', type=int, choices=(10, 16), default=10, help='T of the random model'
    )
    parser.add_argument('--tiny', action='store_true', help='shrink the random model, for tests')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--threads', type=int, default=1, help='torch threads')
    parser.add_argument(
        '--chunks', type=int, default=MIN_CHUNKS, help='measured chunks of every arm'
    )
    parser.add_argument('--warm-up', type=int, default=3, help='chunks before the measured ones')
    parser.add_argument('--only', default='', help='only arms whose name contains this')
    parser.add_argument(
        '--trace', type=Path, metavar='FOLDER', help='write a timeline of one chunk of every arm'
    )
    parser.add_argument('--json', type=Path, help='write the result to this file as well')
    arguments = parser.parse_args()
    for name, lowest in (('chunks', 1), ('warm_up', 1), ('threads', 1)):
        if getattr(arguments, name) < lowest:
            parser.error(
                f'--{name.replace("_", "-")} must be at least {lowest}, '
                f'got {getattr(arguments, name)}'
            )
    return arguments


def measure(arms: list[Arm], chunks: int, warm_up: int, device: str) -> dict[str, Any]:
    """Run the arms in turn; returns percentiles and median stages by arm, in milliseconds."""
    timings: dict[str, list[Timing]] = {arm.name: [] for arm in arms}
    for turn in tqdm(range(warm_up + chunks), desc='chunks', dynamic_ncols=True):
        for arm in arms:
            timing = run_timed(arm, device == 'cuda')
            if turn >= warm_up:
                timings[arm.name].append(timing)
    return {name: summarise(taken) for name, taken in timings.items()}


def summarise(timings: list[Timing]) -> dict[str, Any]:
    """Percentiles of an arm and its median stages; processor time is free of other processes."""
    p50, p95, p99 = np.percentile([timing.wall_s for timing in timings], (50, 95, 99))
    stages = {
        stage: np.median([timing.stages_s[stage] for timing in timings])
        for stage in timings[0].stages_s
    }
    times = {
        'p50_ms': p50,
        'p95_ms': p95,
        'p99_ms': p99,
        'cpu_p50_ms': np.median([timing.cpu_s for timing in timings]),
    }
    return {
        **{name: round(1e3 * float(value), 3) for name, value in times.items()},
        'stages_ms': {name: round(1e3 * float(value), 3) for name, value in stages.items()},
    }


def write_traces(arms: list[Arm], folder: Path, device: str) -> None:
    """Write the timeline of one chunk of every arm, for chrome://tracing or Perfetto."""
    activities = [ProfilerActivity.CPU]
    if device == 'cuda':
        activities.append(ProfilerActivity.CUDA)
    folder.mkdir(parents=True, exist_ok=True)
    for arm in arms:
        with profile(activities=activities) as profiler:
            run_timed(arm, device == 'cuda')
        profiler.export_chrome_trace(str(folder / f'{arm.name}.json'))


def print_table(results: dict[str, Any]) -> None:
    """Percentiles and speed against the first arm, then the stages of every arm."""
    baseline = next(iter(results.values()))['p50_ms']
    width = max(len(name) for name in results)
    columns = ('p50_ms', 'p95_ms', 'p99_ms', 'cpu_p50_ms')
    print(f'{"arm":{width}}  {" ".join(f"{column:>10}" for column in columns)}   speed')
    for name, row in results.items():
        times = ' '.join(f'{row[column]:10.2f}' for column in columns)
        print(f'{name:{width}}  {times} {baseline / row["p50_ms"]:6.1f}x')
    print()
    for name, row in results.items():
        parts = ', '.join(f'{stage} {ms:.2f}' for stage, ms in row['stages_ms'].items())
        print(f'{name:{width}}  {parts}')


def main() -> None:
    """Measure, print the table, write the JSON."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.bundle is not None:
        model = bundle_model(arguments.bundle, arguments.device)
    else:
        model = random_model(arguments.horizon, arguments.device, arguments.tiny)
    machine = describe_machine(arguments.device)
    print(', '.join(f'{key} {value}' for key, value in machine.items()))
    arms = [arm for arm in make_arms(model) if arguments.only in arm.name]
    results = measure(arms, arguments.chunks, arguments.warm_up, arguments.device)
    for arm in arms:
        if (seconds := scheduler_s(arm, model)) is not None:
            results[arm.name]['scheduler_alone_ms'] = round(1e3 * seconds, 3)
    if arguments.trace is not None:
        write_traces(arms, arguments.trace, arguments.device)
    print_table(results)
    if arguments.json is not None:
        settings = {
            'model': str(arguments.bundle or 'random'),
            'spec': vars(model.denoiser.spec),
            'chunks': arguments.chunks,
            'warm_up': arguments.warm_up,
        }
        data = {'machine': machine, 'settings': settings, 'arms': results}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(data, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
