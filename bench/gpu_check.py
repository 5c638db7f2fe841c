# SPDX-License-Identifier: Apache-2.0
"""Whether every engine is right on this device: against the eager one, and in what it allocates.

    .venv/bin/python bench/gpu_check.py --json out/gpu_check.json

Chunks of random plans over several episodes, the sparsity changed between ticks, are compared with
those of the eager engine in float32; then, on a GPU, ticks in steady state must not make the
allocator ask the device for memory, nor keep any. Ends with 0 if all is well, with 1 if an engine
is wrong, with 2 if there is no such device. `bench/latency.py --device cuda` has the times.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from arms import Model, random_model
from machine import describe_machine
from torch import Tensor
from tqdm import tqdm

from tts_policy.core.chunk_sampler import ChunkSampler
from tts_policy.core.engines import engine_maker
from tts_policy.core.stopwatch import Stopwatch

SPARSITIES = (0.8, 0.5, 0.9, 0.8, 0.0, 0.8)
EPISODES, WARM_UP, TICKS = 3, 20, 200
# Half precision in the kernel's weights and tokens; a share of the largest action.
TOLERANCES = {'eager': 1e-4, 'graphs': 1e-4, 'triton': 2e-2}


def _chunks(model: Model, sampler: str, engine: str, features: list[Tensor]) -> list[Tensor]:
    """Chunks [T, A] of all ticks of all episodes."""
    spec, pruner = model.samplers[sampler]
    chunks = ChunkSampler(model.denoiser, spec, pruner, engine=engine_maker(engine))
    made = []
    for episode in range(EPISODES):
        chunks.reset(episode)
        for observed, sparsity in zip(features, SPARSITIES, strict=True):
            x, _, _ = chunks.sample(observed, sparsity, Stopwatch())
            made.append(x[0].cpu().clone())
    return made


def _allocations(tick: Callable[[], Any]) -> dict[str, int]:
    """What the allocator asked the device for, and kept, over ticks in steady state."""
    for _ in range(WARM_UP):
        tick()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    for _ in range(TICKS):
        tick()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    return {
        name: after[key] - before[key]
        for name, key in (
            ('segments', 'segment.all.allocated'),
            ('kept_bytes', 'allocated_bytes.all.current'),
        )
    }


def check(
    model: Model, sampler: str, engine: str, features: list[Tensor], expected: list[Tensor]
) -> dict[str, Any]:
    """One engine: its largest difference, and its allocations on a GPU."""
    made = _chunks(model, sampler, engine, features)
    error = max(float((a - b).abs().max()) for a, b in zip(made, expected, strict=True))
    row: dict[str, Any] = {'error': error, 'tolerance': TOLERANCES[engine]}
    if model.denoiser.device.type == 'cuda':
        spec, pruner = model.samplers[sampler]
        chunks = ChunkSampler(model.denoiser, spec, pruner, engine=engine_maker(engine))
        row |= _allocations(lambda: chunks.sample(features[0], 0.8, Stopwatch())[0].cpu())
    grown = row.get('segments', 0) or row.get('kept_bytes', 0)
    return {**row, 'ok': error <= row['tolerance'] and not grown}


def main() -> int:
    """Check every engine with every sampler; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
    parser.add_argument('--tiny', action='store_true', help='shrink the random model, for tests')
    parser.add_argument('--json', type=Path, help='write the result to this file as well')
    args = parser.parse_args()
    if args.device == 'cuda' and not torch.cuda.is_available():
        print('gpu_check: a CUDA device expected, got none', file=sys.stderr)
        return 2
    engines = ['eager', 'graphs']
    if args.device == 'cuda' and find_spec('triton') is not None:
        engines.append('triton')
    torch.set_num_threads(1)
    rows = {}
    with torch.inference_mode():
        model = random_model(10, args.device, args.tiny)
        features = [model.observe() for _ in SPARSITIES]
        for sampler in tqdm(model.samplers, unit='sampler'):
            expected = _chunks(model, sampler, 'eager', features)
            for engine in engines:
                row = check(model, sampler, engine, features, expected)
                rows[f'{engine} {sampler}'] = row
    report = {'machine': describe_machine(args.device), 'engines': rows}
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + '\n')
    for name, row in rows.items():
        print(name, ' '.join(f'{key} {value}' for key, value in row.items()))
    return 0 if all(row['ok'] for row in rows.values()) else 1


if __name__ == '__main__':
    sys.exit(main())
