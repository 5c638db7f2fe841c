# SPDX-License-Identifier: Apache-2.0
"""One engine against the eager one, on the device it is for; see `gpu_check`."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import Model, random_model
from numpy.typing import NDArray
from torch import Tensor

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
