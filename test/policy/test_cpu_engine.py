# SPDX-License-Identifier: Apache-2.0
"""The CPU engine against the eager one over ticks, plans and resets; what it leaves in memory."""

from __future__ import annotations

import gc
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tts_policy.policy.chunk_sampler import ChunkSampler
from tts_policy.policy.denoisers.transformer import TransformerDenoiser, TransformerSpec
from tts_policy.policy.engines.cpu import CpuEngine
from tts_policy.policy.engines.eager import EagerEngine, Engine
from tts_policy.policy.engines.packed import pack_linear
from tts_policy.policy.engines.registry import make_engine
from tts_policy.policy.feature_cache import FeatureCache
from tts_policy.policy.plan import Plan, dense_plan, make_plan
from tts_policy.policy.pruner import Pruner, PrunerSpec
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.policy.scheduler import NoiseScheduler, SchedulerSpec
from tts_policy.policy.stopwatch import Stopwatch

SPEC = TransformerSpec(
    action_dim=3, horizon=8, obs_steps=2, obs_features=7, width=32, layers=2, heads=2
)
STEPS = 6
SCHEDULERS = {
    'ddpm': SchedulerSpec('ddpm', STEPS, STEPS),
    'ddim': SchedulerSpec('ddim', STEPS, 60),
    'ddim_sample': SchedulerSpec('ddim', STEPS, 60, prediction='sample', clip=0.5, steps_offset=1),
    'ddpm_sample': SchedulerSpec('ddpm', STEPS, STEPS, prediction='sample', clip=0.0),
}


def random_denoiser(half: bool, spec: TransformerSpec = SPEC) -> TransformerDenoiser:
    """Denoiser with weights that half precision holds exactly, as a bundle's, or does not."""
    torch.manual_seed(0)
    denoiser = TransformerDenoiser(spec).eval().requires_grad_(False)
    for parameter in denoiser.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.1)
        if half:
            parameter.copy_(parameter.half())
    return denoiser


class Run:
    """One engine with a cache of its own."""

    def __init__(
        self,
        kind: type[EagerEngine] | type[CpuEngine],
        scheduler: str,
        force: bool,
        half: bool,
        causal: bool = True,
    ) -> None:
        noise_scheduler = NoiseScheduler(SCHEDULERS[scheduler])
        self.cache = FeatureCache(SPEC, STEPS, noise_scheduler.needs_noise, torch.device('cpu'))
        self.engine: Engine = kind(
            random_denoiser(half, replace(SPEC, causal=causal)),
            noise_scheduler,
            self.cache,
            force,
        )
        self.force = force
        self.reset(0)

    def reset(self, seed: int) -> None:
        self.cache.reset(torch.Generator().manual_seed(seed))

    def tick(self, features: Tensor, logits: np.ndarray, sparsity: float) -> Tensor:
        def plan() -> Plan:
            if self.force and self.cache.tick == 0:
                # A forced step 0 has run by the time the plan is asked for.
                assert torch.isfinite(self.cache.features[0]).all()
            valid, kinds = self.cache.rollout_valid(4), SPEC.stack.kinds
            return make_plan(logits, sparsity, valid, self.force, kinds)

        self.engine.observe(features)
        x, executed = self.engine.denoise(plan, Stopwatch())
        self.cache.commit(executed)
        return x


@given(
    seed=st.integers(0, 2**32 - 1),
    sparsities=st.lists(st.floats(0.0, 1 - 1 / STEPS), min_size=2, max_size=4),
    force=st.booleans(),
    half=st.booleans(),
    causal=st.booleans(),
    scheduler=st.sampled_from(sorted(SCHEDULERS)),
)
@settings(max_examples=40, deadline=None)
@torch.inference_mode()
def test_equals_the_eager_engine_over_random_plans_and_a_reset(
    seed: int, sparsities: list[float], force: bool, half: bool, causal: bool, scheduler: str
) -> None:
    eager, fast = (Run(kind, scheduler, force, half, causal) for kind in (EagerEngine, CpuEngine))
    rng = np.random.default_rng(seed)
    for episode in range(2):
        for run in (eager, fast):
            run.reset(episode)
        for sparsity in [0.0, *sparsities]:
            features = torch.from_numpy(rng.standard_normal((1, 2, 7), np.float32))
            logits = rng.standard_normal((STEPS, SPEC.blocks, 4), np.float32)
            expected = eager.tick(features, logits, sparsity)
            difference = (fast.tick(features, logits, sparsity) - expected).abs().max()
            assert difference < 1e-4 * max(1.0, float(expected.abs().max()))
            tokens = eager.engine.observation_tokens
            assert (fast.engine.observation_tokens - tokens).abs().max() < 1e-5
        # Later ticks reuse these.
        assert (fast.cache.features - eager.cache.features).abs().max() < 1e-4
    assert (fast.engine.time_tokens == eager.engine.time_tokens).all()


@pytest.mark.parametrize('scheduler', sorted(SCHEDULERS))
@pytest.mark.parametrize('force', [True, False])
@torch.inference_mode()
def test_sparsity_zero_is_bitwise_the_plain_dense_loop(scheduler: str, force: bool) -> None:
    run = Run(CpuEngine, scheduler, force, half=True)
    assert isinstance(run.engine, CpuEngine)
    rng = np.random.default_rng(0)
    for sparsity in (0.0, 0.6, 0.0):
        features = torch.from_numpy(rng.standard_normal((1, 2, 7), np.float32))
        logits = rng.standard_normal((STEPS, SPEC.blocks, 4), np.float32)
        x = run.tick(features, logits, sparsity)
        if sparsity == 0.0:
            assert torch.equal(x, run.engine.denoise_dense())
    assert not torch.equal(run.tick(features, logits, 0.6), run.engine.denoise_dense())


@torch.inference_mode()
def test_an_unchanged_plan_reads_the_features_of_this_tick() -> None:
    eager, fast = (Run(kind, 'ddim', True, True) for kind in (EagerEngine, CpuEngine))
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((STEPS, SPEC.blocks, 4), np.float32)
    for tick in range(5):
        features = torch.from_numpy(rng.standard_normal((1, 2, 7), np.float32))
        x = [run.tick(features, logits, 0.7 if tick else 0.0) for run in (eager, fast)]
        assert (x[0] - x[1]).abs().max() < 1e-4


@torch.inference_mode()
def test_the_result_of_a_tick_survives_the_next() -> None:
    run = Run(CpuEngine, 'ddpm', True, True)
    logits = np.zeros((STEPS, SPEC.blocks, 4), np.float32)
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


def test_the_cpu_gets_the_cpu_engine_and_unknown_blocks_the_eager_one() -> None:
    class Other(nn.Identity):
        pass

    cache = FeatureCache(SPEC, STEPS, False, torch.device('cpu'))
    scheduler = NoiseScheduler(SCHEDULERS['ddim'])
    denoiser = random_denoiser(True)
    with torch.inference_mode():
        assert isinstance(make_engine(denoiser, scheduler, cache, True), CpuEngine)
        denoiser.blocks[2] = Other()
        assert isinstance(make_engine(denoiser, scheduler, cache, True), EagerEngine)


def resident_bytes() -> int:
    gc.collect()
    return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
def test_resident_memory_does_not_grow_over_ten_thousand_ticks() -> None:
    spec = TransformerSpec(
        action_dim=2, horizon=4, obs_steps=1, obs_features=3, width=16, layers=1, heads=2
    )
    sampler_spec = SamplerSpec(SchedulerSpec('ddim', 3, 30), force_first_step=False)
    torch.manual_seed(0)
    pruner = Pruner(PrunerSpec(3, spec.blocks, spec.width, 1, (0.6,), hidden=8)).requires_grad_(
        False
    )
    with torch.no_grad():
        pruner.tables.normal_()
        pruner.cell.normal_()
    sampler = ChunkSampler(random_denoiser(True, spec), sampler_spec, pruner)
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
