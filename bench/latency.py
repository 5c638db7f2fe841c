# SPDX-License-Identifier: Apache-2.0
"""Time one action chunk: upstream's dense loop, ours, the sparse engine, the paper's ablation.

All variants take turns in one process, chunk by chunk, so that ratios compare the same machine in
the same minute. With --random the model has upstream's size and no observation encoder; with
--bundle the bundle's own encoder, pruners and recommended sparsities are timed. The first chunk of
a sampler is dense and belongs to the warm-up.

    .venv/bin/pip install -r requirements/bench.txt -c requirements/constraints.txt
    .venv/bin/python bench/latency.py --random --json out/latency.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from variants import (
    Chunk,
    Model,
    SampledChunks,
    Timing,
    bundle_model,
    declare_variants,
    random_model,
    run_timed,
)

MIN_CHUNKS = 200
SAVE_EVERY = 25


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
        '--chunks', type=int, default=MIN_CHUNKS, help='measured chunks of every variant'
    )
    parser.add_argument('--warm-up', type=int, default=3, help='chunks before the measured ones')
    parser.add_argument('--only', default='', help='only variants whose name contains this')
    parser.add_argument(
        '--trace',
        type=Path,
        metavar='FOLDER',
        help='write a timeline of one chunk of every variant',
    )
    parser.add_argument('--json', type=Path, help='write the result to this file as well')
    arguments = parser.parse_args()
    for name, lowest in (('chunks', 1), ('warm_up', 1), ('threads', 1)):
        if getattr(arguments, name) < lowest:
            parser.error(
                f'--{name.replace("_", "-")}: expected at least {lowest}, '
                f'got {getattr(arguments, name)}'
            )
    return arguments


Results = dict[str, dict[str, Any]]


def measure(
    variants: dict[str, Chunk],
    chunks: int,
    warm_up: int,
    on_gpu: bool,
    save: Callable[[Results], None],
) -> Results:
    """Run the variants in turn; return percentiles and median stages by variant, in milliseconds.

    Results are saved now and then, and when the run is interrupted.
    """
    timings: dict[str, list[Timing]] = {name: [] for name in variants}

    def summary() -> Results:
        return {name: summarise(taken) for name, taken in timings.items() if taken}

    try:
        for turn in tqdm(range(warm_up + chunks), desc='chunks', dynamic_ncols=True):
            for name, chunk in variants.items():
                timing = run_timed(chunk, on_gpu)
                if turn >= warm_up:
                    timings[name].append(timing)
            if (turn + 1) % SAVE_EVERY == 0:
                save(summary())
    except KeyboardInterrupt:
        save(summary())
        raise
    return summary()


def summarise(timings: list[Timing]) -> dict[str, Any]:
    """Return percentiles of a variant and its median stages; processor time ignores other load."""
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
        'chunks': len(timings),
        **{name: round(1e3 * float(value), 3) for name, value in times.items()},
        'stages_ms': {name: round(1e3 * float(value), 3) for name, value in stages.items()},
    }


def write_traces(variants: dict[str, Chunk], folder: Path, device: str) -> None:
    """Write the timeline of one chunk of every variant, for chrome://tracing or Perfetto."""
    activities = [ProfilerActivity.CPU]
    if device == 'cuda':
        activities.append(ProfilerActivity.CUDA)
    folder.mkdir(parents=True, exist_ok=True)
    for name, chunk in variants.items():
        with profile(activities=activities) as profiler:
            run_timed(chunk, device == 'cuda')
        profiler.export_chrome_trace(str(folder / f'{name}.json'))


def print_table(results: dict[str, Any]) -> None:
    """Percentiles and speed against the first variant, then the stages of every variant."""
    baseline = next(iter(results.values()))['p50_ms']
    width = max(len(name) for name in results)
    columns = ('p50_ms', 'p95_ms', 'p99_ms', 'cpu_p50_ms')
    print(f'{"variant":{width}}  {" ".join(f"{column:>10}" for column in columns)}   speed')
    for name, row in results.items():
        times = ' '.join(f'{row[column]:10.2f}' for column in columns)
        print(f'{name:{width}}  {times} {baseline / row["p50_ms"]:6.1f}x')
    print()
    for name, row in results.items():
        parts = ', '.join(f'{stage} {ms:.2f}' for stage, ms in row['stages_ms'].items())
        print(f'{name:{width}}  {parts}')


def make_chunks(model: Model, only: str) -> dict[str, Chunk]:
    """Set up the variants whose name contains `only`, and no other."""
    return {
        variant.name: variant.make() for variant in declare_variants(model) if only in variant.name
    }


def writer(arguments: argparse.Namespace, model: Model) -> Callable[[Results], None]:
    """Return a function that writes results to the file asked for, whole or not at all."""
    machine = describe_machine(arguments.device)
    print(', '.join(f'{key} {value}' for key, value in machine.items()))
    settings = {
        'model': str(arguments.bundle or 'random'),
        'spec': vars(model.denoiser.spec),
        'chunks': arguments.chunks,
        'warm_up': arguments.warm_up,
    }

    def write(results: Results) -> None:
        file: Path | None = arguments.json
        if file is None:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        data = {'machine': machine, 'settings': settings, 'variants': results}
        part = file.with_name(f'{file.name}.part')
        part.write_text(json.dumps(data, indent=1) + '\n', encoding='utf-8')
        part.replace(file)

    return write


def main() -> int:
    """Measure, print the table and write the JSON; return the exit status."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    on_gpu = arguments.device == 'cuda'
    if on_gpu and not torch.cuda.is_available():
        print('latency: device: expected a CUDA device, got none', file=sys.stderr)
        return 2
    if arguments.bundle is not None:
        model = bundle_model(arguments.bundle, arguments.device)
    else:
        model = random_model(arguments.horizon, arguments.device, arguments.tiny)
    variants = make_chunks(model, arguments.only)
    if not variants:
        names = ', '.join(variant.name for variant in declare_variants(model))
        print(
            f'latency: --only: expected a part of one of {names}, got {arguments.only!r}',
            file=sys.stderr,
        )
        return 2
    save = writer(arguments, model)
    try:
        results = measure(variants, arguments.chunks, arguments.warm_up, on_gpu, save)
    except KeyboardInterrupt:
        return 130
    save(results)
    if arguments.trace is not None:
        write_traces(variants, arguments.trace, arguments.device)
    for name, chunk in variants.items():
        if isinstance(chunk, SampledChunks):
            results[name] |= chunk.alone_ms(on_gpu)
    save(results)
    print_table(results)
    return 0


if __name__ == '__main__':
    sys.exit(main())
