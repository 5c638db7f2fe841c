# SPDX-License-Identifier: Apache-2.0
"""The packed engine against the eager one, over ticks, plans and resets; its use of memory."""

from __future__ import annotations

import gc
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_rig import (
    CPU,
    SCHEDULERS,
    STEPS,
    Run,
    random_denoiser,
    random_features,
    random_logits,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tts_policy.policy.chunk_sampler import ChunkSampler
from tts_policy.policy.engines.eager import EagerEngine
from tts_policy.policy.engines.packed import PackedEngine
from tts_policy.policy.engines.packed_blocks import pack_linear
from tts_policy.policy.engines.program import CONSTANT
from tts_policy.policy.engines.registry import find_engine
from tts_policy.policy.feature_cache import FeatureCache
from tts_policy.policy.plan import dense_plan
from tts_policy.policy.pruner import Pruner, PrunerSpec
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.policy.schedulers.scheduler import SchedulerSpec
from tts_policy.policy.stopwatch import Stopwatch

DIFFUSION = sorted(set(SCHEDULERS) - {'flow'})


@given(
    seed=st.integers(0, 2**32 - 1),
    sparsities=st.lists(st.floats(0.0, 1 - 1 / STEPS), min_size=2, max_size=4),
    force=st.booleans(),
    half=st.booleans(),
    causal=st.booleans(),
    scheduler=st.sampled_from(DIFFUSION),
)
@settings(max_examples=40, deadline=None)
@torch.inference_mode()
def test_equals_the_eager_engine_over_random_plans_and_a_reset(
    seed: int, sparsities: list[float], force: bool, half: bool, causal: bool, scheduler: str
) -> None:
    denoiser = random_denoiser(half=half, causal=causal)
    eager, fast = (Run(kind, scheduler, force, denoiser) for kind in (EagerEngine, PackedEngine))
    rng = np.random.default_rng(seed)
    for episode in range(2):
        for run in (eager, fast):
            run.reset(episode)
        for sparsity in [0.0, *sparsities]:
            features, logits = random_features(rng), random_logits(rng, eager.cache)
            expected = eager.tick(features, logits, sparsity)
            difference = (fast.tick(features, logits, sparsity) - expected).abs().max()
            assert difference < 1e-4 * max(1.0, float(expected.abs().max()))
            tokens = eager.engine.observation_tokens
            assert (fast.engine.observation_tokens - tokens).abs().max() < 1e-5
        # Later ticks reuse these.
        assert (fast.cache.features - eager.cache.features).abs().max() < 1e-4
    assert (fast.engine.time_tokens == eager.engine.time_tokens).all()


def plain_dense_loop(engine: PackedEngine, cache: FeatureCache) -> Tensor:
    """Every block of every step, by the engine's own functions, with nothing cached."""
    engine._x.copy_(cache.initial_noise[0])
    engine._scheduler.begin()
    residual = torch.empty_like(engine._tokens)
    for step in range(STEPS):
        engine._embed(CONSTANT)
        for layer, block in zip(engine._layers, engine._blocks, strict=True):
            if layer is not None:
                engine._memory.enter(step, layer)
            block(engine._tokens, residual)
            engine._tokens.add_(residual)
        engine._finish(step)
    return engine._x.clone()[None]


@pytest.mark.parametrize('scheduler', DIFFUSION)
@pytest.mark.parametrize('force', [True, False])
@torch.inference_mode()
def test_sparsity_zero_is_bitwise_the_plain_dense_loop(scheduler: str, force: bool) -> None:
    run = Run(PackedEngine, scheduler, force)
    assert isinstance(run.engine, PackedEngine)
    rng = np.random.default_rng(0)
    for sparsity in (0.0, 0.6, 0.0):
        features, logits = random_features(rng), random_logits(rng, run.cache)
        x = run.tick(features, logits, sparsity)
        if sparsity == 0.0:
            assert torch.equal(x, plain_dense_loop(run.engine, run.cache))
    x = run.tick(features, logits, 0.6)
    assert not torch.equal(x, plain_dense_loop(run.engine, run.cache))


@torch.inference_mode()
def test_an_unchanged_plan_reads_the_features_of_this_tick() -> None:
    eager, fast = Run(EagerEngine), Run(PackedEngine)
    rng = np.random.default_rng(1)
    logits = random_logits(rng, fast.cache)
    for tick in range(5):
        features = random_features(rng)
        x = [run.tick(features, logits, 0.7 if tick else 0.0) for run in (eager, fast)]
        assert (x[0] - x[1]).abs().max() < 1e-4


@torch.inference_mode()
def test_the_result_of_a_tick_survives_the_next() -> None:
    run = Run(PackedEngine, 'ddpm')
    logits = np.zeros((STEPS, run.cache.blocks, 4), np.float32)
    first = run.tick(torch.ones(1, 2, 7), logits, 0.0)
    kept = first.clone()
    run.tick(-torch.ones(1, 2, 7), logits, 0.0)
    assert torch.equal(first, kept)


@pytest.mark.parametrize('half', [True, False])
@torch.inference_mode()
def test_packed_linear_layers_multiply_in_single_precision(half: bool) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(48, 32), torch.randn(48), torch.randn(8, 32)
    if half:
        weight = weight.half().float()
    y = pack_linear(weight, bias, 8)(x)
    exact = x.double() @ weight.double().t() + bias
    assert (y - exact).abs().max() < 1e-5


def test_engines_are_found_by_name_and_the_cpu_gets_the_packed_one_where_it_can() -> None:
    class Other(nn.Identity):
        pass

    denoiser = random_denoiser()
    for name in ('auto', 'packed'):
        assert find_engine(name, denoiser, CPU) is PackedEngine
    assert find_engine('auto', denoiser, torch.device('cuda')) is EagerEngine
    denoiser.blocks[2] = Other()
    for name in ('auto', 'eager'):
        assert find_engine(name, denoiser, CPU) is EagerEngine


@pytest.mark.parametrize(
    ('engine', 'device', 'reason'),
    [
        ('fast', 'cpu', "engine: expected one of auto, eager, packed, cuda, got 'fast'"),
        ('packed', 'cuda', "engine 'packed': expected a CPU, got cuda"),
        ('packed', 'cpu', "engine 'packed': expected a float32 transformer .* got DiTDenoiser"),
    ],
)
def test_unknown_and_unfit_engines_are_refused_with_the_reason(
    engine: str, device: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        find_engine(engine, random_denoiser('dit'), torch.device(device))


def resident_bytes() -> int:
    gc.collect()
    return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
def test_resident_memory_does_not_grow_over_ten_thousand_ticks() -> None:
    sizes = {'action_dim': 2, 'horizon': 4, 'obs_steps': 1, 'obs_features': 3}
    denoiser = random_denoiser(**sizes, width=16, layers=1)
    spec = denoiser.spec
    sampler_spec = SamplerSpec(SchedulerSpec('ddim', 3, 30), force_first_step=False)
    torch.manual_seed(0)
    pruner = Pruner(PrunerSpec(3, spec.blocks, spec.width, 1, (0.6,), hidden=8)).requires_grad_(
        False
    )
    with torch.no_grad():
        pruner.tables.normal_()
        pruner.cell.normal_()
    sampler = ChunkSampler(denoiser, sampler_spec, pruner)
    features = torch.randn(64, 1, 1, 3)
    plans = set()

    def ticks(count: int) -> None:
        for n in range(count):
            _, plan, _ = sampler.sample(features[n % 64], 0.6, Stopwatch())
            plans.add(plan.tobytes())

    ticks(1000)
    before = resident_bytes()
    ticks(10_000)
    assert resident_bytes() - before < 1 << 20  # 100 bytes a tick
    assert len(plans) > 1 and dense_plan(3, 3).tobytes() in plans
