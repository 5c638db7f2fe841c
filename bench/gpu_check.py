# SPDX-License-Identifier: Apache-2.0
"""Whether every engine is right on this device: compared with the eager one, and what it keeps.

    .venv/bin/python bench/gpu_check.py --json out/gpu_check.json

Chunks of random plans over several episodes, with the sparsity changed between ticks, are compared
with those of the eager engine: as they are, with a pruner whose plan comes late, and through the
whole policy, from images and joints to actions some of which are held. On a GPU, ticks in steady
state must not keep memory. Every engine runs in a process of its own with a time limit, so that
one that hangs or crashes is a line of the report.

The exit status is 0 if all is well, 1 if an engine is wrong and 2 if there is no such device.
`bench/latency.py --device cuda` measures the times.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from variants import Model, random_model

from tts_policy.policy.bundle import save_random_bundle
from tts_policy.policy.chunk_sampler import ChunkSampler
from tts_policy.policy.contract import CommittedActions
from tts_policy.policy.network import NetworkSpec
from tts_policy.policy.policy import TestTimeSparsePolicy
from tts_policy.policy.pruner import PlanPruner
from tts_policy.policy.sampler import DIFFUSION_SAMPLERS, SamplerSpec
from tts_policy.policy.stopwatch import Stopwatch
from tts_policy.sim.panda import PANDA_CONTRACT

SPARSITIES = (0.8, 0.5, 0.9, 0.8, 0.0, 0.8)
EPISODES, TICKS = 3, 200
# Three times as long as a feature may live: every plan that comes in steady state has come.
WARM_UP = 3 * (SamplerSpec.max_rollout_age + 1)
# Largest difference of a normalised action.
TOLERANCE = 1e-4
# About 50 ms at the clock of a GPU.
LATE_CYCLES = 100_000_000


class LatePruner(PlanPruner):
    """A pruner that keeps its stream busy, on a GPU, before it says anything."""

    def __init__(self, pruner: PlanPruner) -> None:
        super().__init__()
        self._pruner = pruner

    @property
    def sparsities(self) -> tuple[float, ...]:
        """Those of the pruner that is late."""
        return self._pruner.sparsities

    def gates(self, time_tokens: Tensor) -> Any:
        """Those of the pruner that is late."""
        return self._pruner.gates(time_tokens)

    def forward(self, gates: Any, observation_tokens: Tensor, sparsity: float) -> Tensor:
        """Logits of the pruner that is late, after a while."""
        if observation_tokens.is_cuda:
            torch.cuda._sleep(LATE_CYCLES)
        logits: Tensor = self._pruner(gates, observation_tokens, sparsity)
        return logits


def _sampled(
    model: Model, sampler: str, engine: str, features: list[Tensor], late: bool = False
) -> list[NDArray[Any]]:
    """Chunks [T, A] of all ticks of all episodes."""
    spec, pruner = model.samplers[sampler]
    given: PlanPruner = LatePruner(pruner).eval() if late else pruner
    chunks = ChunkSampler(model.denoiser, spec, given, engine=engine)
    made = []
    for episode in range(EPISODES):
        chunks.reset(episode)
        for observed, sparsity in zip(features, SPARSITIES, strict=True):
            x, _, _ = chunks.sample(observed, sparsity, Stopwatch())
            made.append(x[0].cpu().numpy().copy())
    return made


def _windows() -> list[dict[str, NDArray[Any]]]:
    """Windows of consecutive ticks: the older frame is the newer one of the tick before."""
    rng, observation = np.random.default_rng(0), PANDA_CONTRACT.observation
    camera = observation.cameras[0]
    frames = rng.integers(
        0, 256, (len(SPARSITIES) + 1, camera.height, camera.width, 3), dtype=np.uint8
    )
    joints = rng.standard_normal((len(SPARSITIES), observation.steps, len(observation.joints)))
    return [
        {camera.key: frames[tick : tick + 2], 'joints': joints[tick]}
        for tick in range(len(SPARSITIES))
    ]


def _acted(bundle: Path, sampler: str, engine: str, device: str) -> list[NDArray[Any]]:
    """Actions of all ticks of all episodes; every second tick holds some of the tick before."""
    policy = TestTimeSparsePolicy.from_bundle(bundle, sampler, device, engine=engine)
    made: list[NDArray[Any]] = []
    for episode in range(EPISODES):
        policy.reset(episode)
        for tick, window in enumerate(_windows()):
            committed = None
            if tick % 2 == 1:
                committed = CommittedActions(made[-1][1:5], np.array([1.0, 1.0, 0.5, 0.2]))
            sparsity = min(SPARSITIES[tick], policy.max_sparsity)
            made.append(policy.act(window, sparsity, committed).actions)
    return made


def _allocations(tick: Callable[[], Any]) -> dict[str, int]:
    """What ticks in steady state made the allocator do, keep and ask the device for."""
    for _ in range(WARM_UP):
        tick()
    # What the set-up left behind must not be freed, nor counted, while ticks are.
    gc.collect()
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
            ('allocations', 'allocation.all.allocated'),
        )
    }


def _row(
    name: str, engine: str, made: list[NDArray[Any]], expected: list[NDArray[Any]]
) -> dict[str, Any]:
    # A value that is not a number stays one here, and compares as wrong.
    error = float(np.abs(np.array(made) - np.array(expected)).max())
    ok = error <= TOLERANCE
    return {'name': f'{engine} {name}', 'ok': ok, 'error': error, 'tolerance': TOLERANCE}


def _with_allocations(row: dict[str, Any], tick: Callable[[], Any]) -> dict[str, Any]:
    # A plan that was not captured runs eagerly, which may allocate, but must keep nothing.
    counted = _allocations(tick)
    return {**row, **counted, 'ok': row['ok'] and counted['kept_bytes'] <= 0}


def _sampler_rows(
    model: Model, sampler: str, engine: str, features: list[Tensor]
) -> Iterator[dict[str, Any]]:
    expected = _sampled(model, sampler, 'eager', features)
    row = _row(sampler, engine, _sampled(model, sampler, engine, features), expected)
    if model.denoiser.device.type == 'cuda':
        spec, pruner = model.samplers[sampler]
        chunks = ChunkSampler(model.denoiser, spec, pruner, engine=engine)
        observed = cycle(features)
        row = _with_allocations(row, lambda: chunks.sample(next(observed), 0.8, Stopwatch()))
    yield row
    late = _sampled(model, sampler, engine, features, late=True)
    yield _row(f'{sampler} late plan', engine, late, expected)


def _policy_row(bundle: Path, sampler: str, engine: str, device: str) -> dict[str, Any]:
    expected = _acted(bundle, sampler, 'eager', device)
    made = _acted(bundle, sampler, engine, device)
    row = _row(f'policy {sampler}', engine, made, expected)
    if device == 'cuda':
        policy = TestTimeSparsePolicy.from_bundle(bundle, sampler, device, engine=engine)
        windows = cycle(_windows())
        row = _with_allocations(row, lambda: policy.act(next(windows), 0.8))
    return row


@torch.inference_mode()
def engine_rows(engine: str, device: str, tiny: bool) -> Iterator[dict[str, Any]]:
    """Rows `{name, ok, error, tolerance, ...}` of an engine, one after another."""
    model = random_model(10, device, tiny)
    features = [model.observe() for _ in SPARSITIES]
    for sampler in model.samplers:
        yield from _sampler_rows(model, sampler, engine, features)
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / 'bundle'
        network = NetworkSpec(width=32, layers=2, heads=2) if tiny else NetworkSpec()
        save_random_bundle(bundle, PANDA_CONTRACT, DIFFUSION_SAMPLERS, network)
        for sampler in DIFFUSION_SAMPLERS:
            yield _policy_row(bundle, sampler, engine, device)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
    parser.add_argument('--tiny', action='store_true', help='shrink the random model, for tests')
    parser.add_argument('--engine', help='check this one alone, in this process')
    parser.add_argument(
        '--limit', type=float, default=600.0, metavar='S', help='seconds that an engine may take'
    )
    parser.add_argument('--json', type=Path, help='write the result to this file as well')
    return parser.parse_args()


def rows_of(engine: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of an engine from a process of its own; the last one says how that ended, if badly."""
    command = [sys.executable, __file__, '--engine', engine, '--device', args.device]
    try:
        run = subprocess.run(
            [*command, *(['--tiny'] if args.tiny else [])],
            stdout=subprocess.PIPE,
            timeout=args.limit,
            text=True,
            check=False,
        )
        written = run.stdout
        ended = '' if run.returncode == 0 else f'its process ended with {run.returncode}'
    except subprocess.TimeoutExpired as expired:
        written = (expired.stdout or b'').decode()
        ended = f'it took longer than {args.limit:g} s'
    rows = [json.loads(line) for line in written.splitlines()]
    return [*rows, {'name': engine, 'ok': False, 'reason': ended}] if ended else rows


def write(file: Path | None, device: str, rows: list[dict[str, Any]]) -> None:
    """Write what is known so far."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        report = {'machine': describe_machine(device), 'rows': rows}
        file.write_text(json.dumps(report, indent=1) + '\n')


def main() -> int:
    """Check every engine; returns the exit status."""
    args = parse_arguments()
    if args.device == 'cuda' and not torch.cuda.is_available():
        print('gpu_check: device: expected a CUDA device, got none', file=sys.stderr)
        return 2
    if args.engine is not None:
        torch.set_num_threads(1)
        for row in engine_rows(args.engine, args.device, args.tiny):
            print(json.dumps(row), flush=True)
        return 0
    engines = ['eager', 'cuda' if args.device == 'cuda' else 'packed']
    rows: list[dict[str, Any]] = []
    for engine in tqdm(engines, unit='engine'):
        rows += rows_of(engine, args)
        write(args.json, args.device, rows)
    for row in rows:
        print(' '.join(f'{key} {value}' for key, value in row.items()))
    return 0 if all(row['ok'] for row in rows) else 1


if __name__ == '__main__':
    sys.exit(main())
