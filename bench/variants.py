# SPDX-License-Identifier: Apache-2.0
"""The variants that the latency benchmark times: a name, and a function that makes one chunk."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from ablation import AllStepsMemory, PerStepMemory, eager_with
from dense_loops import captured_dense, compiled_dense
from machine import DeviceStopwatch
from numpy.typing import NDArray
from torch import Tensor
from upstream import UpstreamSampler

from tts_policy.policy.bundle import load_bundle
from tts_policy.policy.chunk_sampler import ChunkSampler
from tts_policy.policy.denoisers.denoiser import Denoiser, DenoiserSpec
from tts_policy.policy.denoisers.transformer import TransformerDenoiser, TransformerSpec
from tts_policy.policy.device import Download
from tts_policy.policy.engines.eager import EagerEngine
from tts_policy.policy.engines.engine import Engine
from tts_policy.policy.engines.registry import AUTO
from tts_policy.policy.frame_encoder import FrameEncoder
from tts_policy.policy.network import PolicyNetwork
from tts_policy.policy.pruner import PlanPruner, Pruner, PrunerSpec
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.policy.schedulers.scheduler import SchedulerSpec
from tts_policy.policy.stopwatch import Stopwatch

TRAIN_STEPS = 100
SPARSITIES = {'ddpm100': 0.95, 'ddim16': 0.80, 'ddim10': 0.80}
OBSERVATIONS = 16

# Makes the chunk of one tick and says when its stages end.
Chunk = Callable[[Stopwatch], None]


@dataclass(frozen=True)
class Variant:
    """A way to make chunks, by name; nothing is set up before `make` is called."""

    name: str
    make: Callable[[], Chunk]


@dataclass(frozen=True)
class Model:
    """What is sampled: a denoiser, samplers with their pruners, and the source of features.

    observe() gives the features [1, To, Do] of the next tick; with a bundle it encodes images.
    """

    denoiser: Denoiser
    samplers: dict[str, tuple[SamplerSpec, PlanPruner]]
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
    spec = TransformerSpec(
        action_dim=8 if horizon == 10 else 10,
        horizon=horizon,
        obs_steps=2,
        obs_features=137,
        width=32 if tiny else 256,
        layers=2 if tiny else 8,
    )
    denoiser = TransformerDenoiser(spec).eval().requires_grad_(False)
    for parameter in denoiser.parameters():
        parameter.copy_(parameter.half())
    observations = cycle(list(torch.randn(OBSERVATIONS, 1, 2, 137).to(device)))
    samplers: dict[str, tuple[SamplerSpec, PlanPruner]] = {
        name: (sampler, random_pruner(spec, sampler.scheduler.steps).to(device))
        for name, sampler in _samplers().items()
    }
    return Model(denoiser.to(device), samplers, lambda: next(observations))


def _random_windows(
    network: PolicyNetwork, device: str
) -> Iterator[tuple[dict[str, NDArray[np.uint8]], Tensor]]:
    """Windows of ticks that execute several actions: both frames of the next one are new."""
    observation, random = network.contract.observation, np.random.default_rng(0)
    windows = []
    for _ in range(OBSERVATIONS):
        images = {
            camera.key: random.integers(
                0, 256, (observation.steps, camera.height, camera.width, 3), dtype=np.uint8
            )
            for camera in observation.cameras
        }
        joints = random.standard_normal((1, observation.steps, len(observation.joints)))
        windows.append((images, torch.from_numpy(joints).float().to(device)))
    return cycle(windows)


def bundle_model(folder: Path, device: str) -> Model:
    """A bundle with its trained pruners; every chunk encodes the frames of its window."""
    bundle = load_bundle(folder)
    network = bundle.network.to(device).eval().requires_grad_(False)
    samplers: dict[str, tuple[SamplerSpec, PlanPruner]] = {
        name: (spec, pruner.to(device).eval().requires_grad_(False))
        for name, (spec, pruner) in bundle.samplers.items()
        if pruner is not None
    }
    windows = _random_windows(network, device)
    encoder = network.observation_encoder
    frames = FrameEncoder(encoder, network.contract.observation, torch.device(device))

    def observe() -> Tensor:
        images, joints = next(windows)
        return encoder.combine(frames(images), network.joint_normalizer.normalize(joints))

    return Model(network.denoiser, samplers, observe)


class SampledChunks:
    """Chunks of one of our samplers, as the ticks of one episode."""

    def __init__(
        self,
        model: Model,
        sampler: str,
        sparsity: float,
        engine: str | type[Engine],
        overlap: bool,
    ) -> None:
        """Set up the sampler; overlap: on a GPU the pruner gets a stream of its own."""
        spec, pruner = model.samplers[sampler]
        self._model, self._sparsity, self._spec = model, sparsity, spec
        self._chunks = ChunkSampler(
            model.denoiser, spec, pruner, engine=engine, overlap_pruner=overlap
        )
        shape = self._chunks.cache.initial_noise.shape
        self._copied = Download(shape, torch.float32, model.denoiser.device)

    @torch.inference_mode()
    def __call__(self, watch: Stopwatch) -> None:
        """Make the chunk of the next tick."""
        features = self._model.observe()
        watch.lap('observation_encoder')
        x, _, _ = self._chunks.sample(features, self._sparsity, watch)
        self._copied.start(x)
        self._copied.wait().astype(float)
        watch.lap('copy_out')

    @torch.inference_mode()
    def alone_ms(self, on_gpu: bool, repetitions: int = 20) -> dict[str, float]:
        """Medians of what the stages of a tick cannot show; it ends the episode.

        plan_ready_ms: from features on the device to the plan on the host, with nothing beside it;
        scheduler_alone_ms: all steps of the scheduler, outside the loop they are part of;
        first_tick_ms: the dense tick after a reset.
        """
        features = self._model.observe()
        noise = torch.randn(3, *self._chunks.cache.initial_noise.shape).to(features.device)
        steps, scheduler = self._spec.scheduler.steps, self._spec.scheduler.make()

        def step_all() -> None:
            x, x0 = noise[0], None
            for step in range(steps):
                x, x0 = scheduler.step(step, x, noise[1], noise[2], x0)
            x.cpu()

        parts = {
            'plan_ready_ms': lambda: self._chunks.plan(features, self._sparsity),
            'scheduler_alone_ms': step_all,
            'first_tick_ms': lambda: self(Stopwatch()),
        }
        medians = {}
        for name, part in parts.items():
            taken = []
            for _ in range(repetitions):
                if name == 'first_tick_ms':
                    self._chunks.reset()
                if on_gpu:
                    torch.cuda.synchronize()
                started = time.perf_counter()
                part()
                taken.append(time.perf_counter() - started)
            medians[name] = round(1e3 * statistics.median(taken), 3)
        return medians


def _sampler_variant(
    model: Model,
    name: str,
    sampler: str,
    sparsity: float,
    engine: str | type[Engine] = AUTO,
    overlap_pruner: bool = True,
) -> Variant:
    return Variant(name, lambda: SampledChunks(model, sampler, sparsity, engine, overlap_pruner))


def _dense_variant(
    model: Model, name: str, make: Callable[[], Callable[[Tensor], Tensor]]
) -> Variant:
    """An variant of another way to sample densely; made: from features to normalised actions."""

    def make_chunk() -> Chunk:
        size = model.denoiser.spec
        shape = 1, size.horizon, size.action_dim
        with torch.inference_mode():
            sample = make()
            copied = Download(shape, torch.float32, model.denoiser.device)

        @torch.inference_mode()
        def chunk(watch: Stopwatch) -> None:
            features = model.observe()
            watch.lap('observation_encoder')
            copied.start(sample(features))
            watch.lap('denoising')
            copied.wait().astype(float)
            watch.lap('copy_out')

        return chunk

    return Variant(name, make_chunk)


def _upstream_variant(model: Model, name: str, sampler: str) -> Variant:
    def make() -> Callable[[Tensor], Tensor]:
        spec, _ = model.samplers[sampler]
        assert isinstance(model.denoiser, TransformerDenoiser)
        upstream = UpstreamSampler(model.denoiser, spec.scheduler)
        denoiser = model.denoiser.spec
        noise = torch.randn(1, denoiser.horizon, denoiser.action_dim).to(model.denoiser.device)
        return lambda features: upstream.sample(features, noise)

    return _dense_variant(model, name, make)


def _cuda_variants(model: Model, name: str, sparsity: float) -> list[Variant]:
    """Arms that only a GPU has: what a user would do instead, our other engine, the pruner."""
    denoiser, (spec, _) = model.denoiser, model.samplers[name]
    variants = [
        _dense_variant(model, f'graph_dense_{name}', lambda: captured_dense(denoiser, spec)),
        _dense_variant(model, f'compiled_dense_{name}', lambda: compiled_dense(denoiser, spec)),
    ]
    label = f'sparse_cuda_{name}_{sparsity:.2f}'
    variants.append(_sampler_variant(model, label, name, sparsity, 'cuda'))
    inline = f'ablation_inline_pruner_{label}'
    variants.append(_sampler_variant(model, inline, name, sparsity, 'cuda', False))
    return variants


def declare_variants(model: Model) -> list[Variant]:
    """Return dense and sparse variants; for a transformer also upstream's and the ablation."""
    variants: list[Variant] = []
    is_transformer = isinstance(model.denoiser, TransformerDenoiser)
    on_gpu = model.denoiser.device.type == 'cuda'
    for name, (spec, _) in model.samplers.items():
        sparsity = spec.recommended_sparsity or SPARSITIES[name]
        comparable = is_transformer and not spec.scheduler.is_flow
        if comparable:
            variants.append(_upstream_variant(model, f'upstream_dense_{name}', name))
        variants.append(_sampler_variant(model, f'dense_{name}', name, 0.0))
        variants.append(_sampler_variant(model, f'sparse_{name}_{sparsity:.2f}', name, sparsity))
        if is_transformer and spec.scheduler.kind == 'ddpm':
            for step, engine in (
                ('per_step_encoding', eager_with(PerStepMemory)),
                ('all_steps_at_once', eager_with(AllStepsMemory)),
                ('folded_time_tokens', EagerEngine),
            ):
                variants.append(
                    _sampler_variant(model, f'ablation_{step}_{name}', name, sparsity, engine)
                )
        if on_gpu:
            variants += _cuda_variants(model, name, sparsity)
    return variants


@dataclass(frozen=True)
class Timing:
    """One chunk: seconds until its actions are on the host, processor time, stages.

    Stages are times of the host or, on a GPU, of the main stream.
    """

    wall_s: float
    cpu_s: float
    stages_s: dict[str, float]


def run_timed(chunk: Chunk, on_gpu: bool) -> Timing:
    """Make one chunk, with nothing left in flight from the variant before."""
    if on_gpu:
        torch.cuda.synchronize()
    watch = DeviceStopwatch() if on_gpu else Stopwatch()
    cpu, started = time.process_time(), time.perf_counter()
    chunk(watch)
    wall_s = time.perf_counter() - started
    stages_s = watch.read() if isinstance(watch, DeviceStopwatch) else watch.stages_s
    return Timing(wall_s, time.process_time() - cpu, stages_s)
