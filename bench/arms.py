# SPDX-License-Identifier: Apache-2.0
"""The arms of the latency benchmark: a name, and a function that makes one chunk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from ablation import AllStepsMemory, PerStepMemory, eager_with
from torch import Tensor
from upstream import UpstreamSampler

from tts_policy.core.bundle import load_bundle
from tts_policy.core.chunk_sampler import ChunkSampler, EngineMaker
from tts_policy.core.denoiser import Denoiser, DenoiserSpec
from tts_policy.core.engine import EagerEngine
from tts_policy.core.engines import make_engine
from tts_policy.core.network import PolicyNetwork
from tts_policy.core.pruner import Pruner, PrunerSpec
from tts_policy.core.sampler import SamplerSpec
from tts_policy.core.scheduler import SchedulerSpec
from tts_policy.core.stopwatch import Stopwatch
from tts_policy.core.transformer import TransformerDenoiser, TransformerSpec

TRAIN_STEPS = 100
SPARSITIES = {'ddpm100': 0.95, 'ddim16': 0.80, 'ddim10': 0.80}
OBSERVATIONS = 16


@dataclass(frozen=True)
class Arm:
    """`chunk()` makes the chunk of one tick and returns the watch that timed it."""

    name: str
    chunk: Callable[[], Stopwatch]


@dataclass(frozen=True)
class Model:
    """What is sampled: a denoiser, samplers with their pruners, and the source of features.

    observe() gives the features [1, To, Do] of the next tick; with a bundle it encodes images.
    """

    denoiser: Denoiser
    samplers: dict[str, tuple[SamplerSpec, Pruner]]
    observe: Callable[[], Tensor]


def random_pruner(denoiser: DenoiserSpec, steps: int) -> Pruner:
    """Pruner that costs what a trained one does and whose plans are random, from a fixed seed.

    They differ from tick to tick, with the observation, so that every tick compiles its plan.
    """
    pruner = Pruner(PrunerSpec.of(denoiser, steps, (0.8,)))
    pruner.requires_grad_(False).tables.normal_()
    pruner.cell.normal_(std=10.0)
    return pruner.eval()


def _samplers() -> dict[str, SamplerSpec]:
    kinds = {'ddpm100': ('ddpm', 100), 'ddim16': ('ddim', 16), 'ddim10': ('ddim', 10)}
    return {
        name: SamplerSpec(SchedulerSpec(kind, steps, TRAIN_STEPS))
        for name, (kind, steps) in kinds.items()
    }


def random_model(horizon: int, device: str, tiny: bool = False) -> Model:
    """Random model of upstream's size, with weights that half precision holds as in a bundle."""
    torch.manual_seed(0)
    sizes = {'width': 32, 'layers': 2} if tiny else {}
    spec = TransformerSpec(
        action_dim=8 if horizon == 10 else 10,
        horizon=horizon,
        obs_steps=2,
        obs_features=137,
        **sizes,
    )
    denoiser = TransformerDenoiser(spec).eval().requires_grad_(False)
    for parameter in denoiser.parameters():
        parameter.copy_(parameter.half())
    observations = cycle(list(torch.randn(OBSERVATIONS, 1, 2, 137).to(device)))
    samplers = {
        name: (sampler, random_pruner(spec, sampler.scheduler.steps).to(device))
        for name, sampler in _samplers().items()
    }
    return Model(denoiser.to(device), samplers, lambda: next(observations))


def _random_windows(
    network: PolicyNetwork, device: str
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    observation = network.contract.observation
    torch.manual_seed(0)
    windows = []
    for _ in range(OBSERVATIONS):
        images = {
            camera.key: torch.randint(
                0, 256, (1, observation.steps, camera.height, camera.width, 3), dtype=torch.uint8
            ).to(device)
            for camera in observation.cameras
        }
        joints = torch.randn(1, observation.steps, len(observation.joints)).to(device)
        windows.append((images, joints))
    return cycle(windows)


def bundle_model(folder: Path, device: str) -> Model:
    """A bundle with its trained pruners; every chunk encodes the images of its window."""
    bundle = load_bundle(folder)
    network = bundle.network.to(device).eval().requires_grad_(False)
    samplers = {
        name: (spec, pruner.to(device).eval().requires_grad_(False))
        for name, (spec, pruner) in bundle.samplers.items()
        if pruner is not None
    }
    windows = _random_windows(network, device)
    return Model(network.denoiser, samplers, lambda: network.features(*next(windows)))


def _sampler_arm(
    model: Model,
    name: str,
    sampler: str,
    sparsity: float,
    engine: EngineMaker = make_engine,
) -> Arm:
    spec, pruner = model.samplers[sampler]
    chunks = ChunkSampler(model.denoiser, spec, pruner, engine=engine)

    @torch.inference_mode()
    def chunk() -> Stopwatch:
        watch = Stopwatch()
        features = model.observe()
        watch.lap('observation_encoder')
        x, _, _ = chunks.sample(features, sparsity, watch)
        x[0].cpu().double().numpy()
        watch.lap('copy_out')
        return watch

    return Arm(name, chunk)


def _upstream_arm(model: Model, name: str, sampler: str) -> Arm:
    spec, _ = model.samplers[sampler]
    assert isinstance(model.denoiser, TransformerDenoiser)
    upstream = UpstreamSampler(model.denoiser, spec.scheduler)
    denoiser = model.denoiser.spec
    noise = torch.randn(1, denoiser.horizon, denoiser.action_dim).to(model.denoiser.device)

    @torch.inference_mode()
    def chunk() -> Stopwatch:
        watch = Stopwatch()
        features = model.observe()
        watch.lap('observation_encoder')
        x = upstream.sample(features, noise)
        watch.lap('denoising')
        x[0].cpu().double().numpy()
        watch.lap('copy_out')
        return watch

    return Arm(name, chunk)


def make_arms(model: Model) -> list[Arm]:
    """Every arm of a model: our dense and sparse ones; of a transformer upstream and ablation."""
    arms = []
    is_transformer = isinstance(model.denoiser, TransformerDenoiser)
    for name, (spec, _) in model.samplers.items():
        sparsity = spec.recommended_sparsity or SPARSITIES[name]
        comparable = is_transformer and not spec.scheduler.is_flow
        if comparable and (spec.scheduler.kind == 'ddpm' or spec.scheduler.steps == 10):
            arms.append(_upstream_arm(model, f'upstream_dense_{name}', name))
        arms.append(_sampler_arm(model, f'dense_{name}', name, 0.0))
        arms.append(_sampler_arm(model, f'sparse_{name}_{sparsity:.2f}', name, sparsity))
        if is_transformer and spec.scheduler.kind == 'ddpm':
            for step, engine in (
                ('per_step_encoding', eager_with(PerStepMemory)),
                ('all_steps_at_once', eager_with(AllStepsMemory)),
                ('folded_time_tokens', EagerEngine),
            ):
                arms.append(_sampler_arm(model, f'ablation_{step}_{name}', name, sparsity, engine))
    return arms


@dataclass(frozen=True)
class Timing:
    """One chunk: seconds until its actions are on the host, processor time, host stages."""

    wall_s: float
    cpu_s: float
    stages_s: dict[str, float]


def run_timed(arm: Arm, synchronise: Callable[[], None]) -> Timing:
    """Make one chunk, with nothing left in flight from the arm before."""
    synchronise()
    cpu, started = time.process_time(), time.perf_counter()
    watch = arm.chunk()
    wall_s = time.perf_counter() - started
    return Timing(wall_s, time.process_time() - cpu, watch.stages_s)
