# SPDX-License-Identifier: Apache-2.0
"""The masked loop against the plain dense loop, against a naive loop, and what it executes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_rig import CPU, SCHEDULERS, STEPS, random_denoiser, random_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tts_policy.policy.denoisers.blocks import CROSS_ATTENTION, SELF_ATTENTION
from tts_policy.policy.denoisers.denoiser import Denoiser, DenoiserSpec
from tts_policy.policy.denoisers.dit import DiTDenoiser, Modulation
from tts_policy.policy.denoisers.transformer import (
    TransformerDenoiser,
)
from tts_policy.policy.engines.eager import MaskedLoop, denoise_dense
from tts_policy.policy.feature_cache import FeatureCache
from tts_policy.policy.plan import Plan, Reuse, dense_plan, make_plan

ARCHITECTURES = ('transformer', 'mixing', 'dit')


class Rig:
    """A random denoiser with what sampling a batch of sequences needs."""

    def __init__(self, kind: str = 'ddpm', batch: int = 1, name: str = 'transformer') -> None:
        self.denoiser, self.batch = random_denoiser(name), batch
        self.kinds = self.denoiser.spec.stack.kinds
        self.scheduler = SCHEDULERS[kind].make()
        self.conditioner = self.denoiser.conditioner(self.scheduler.spec.timesteps())
        noisy = self.scheduler.needs_noise
        self.cache = FeatureCache(self.denoiser.spec, STEPS, noisy, CPU, batch=batch)
        self.cache.reset(torch.Generator().manual_seed(3))
        self.features = torch.empty(0)

    def observe(self, tick: int) -> None:
        generator = torch.Generator().manual_seed(tick)
        self.features = torch.randn(self.batch, 2, 7, generator=generator)
        self.conditioner.encode(self.features)

    def dense(self) -> Tensor:
        return denoise_dense(self.denoiser, self.scheduler, self.conditioner, self.cache)

    def masked(self, plan: Plan) -> Tensor:
        loop = MaskedLoop(self.denoiser, self.scheduler, self.conditioner, self.cache)
        x = loop.run(plan)
        self.cache.commit(plan)
        return x

    def plan(self, rng: np.random.Generator, sparsity: float, force: bool = False) -> Plan:
        logits, valid = random_logits(rng, self.cache), self.cache.rollout_valid(100)
        return make_plan(logits, sparsity, valid, force, self.kinds)


def conditioning_anew(denoiser: Denoiser, block: int, t: float, features: Tensor) -> Any:
    """Conditioning of a block at a timestep, with nothing computed in advance."""
    times = torch.full((len(features),), t)
    if isinstance(denoiser, DiTDenoiser):
        both = torch.cat([denoiser.time_features(times), features.flatten(1)], dim=-1)
        parts = denoiser.modulations[block](both * both.sigmoid())[:, None].chunk(3, -1)
        return Modulation(*parts)
    assert isinstance(denoiser, TransformerDenoiser)
    encoder = denoiser.encoder
    tokens = [encoder.time_tokens(times)[:, None], encoder.observation_tokens(features)]
    memory = encoder.mix(torch.cat(tokens, dim=1))
    return (denoiser.self_mask, denoiser.conditioning(block // 3, memory), None)[block % 3]


class NaiveLoop:
    """The method as the paper writes it: three caches, one cell at a time, nothing collapsed."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.tau_r: dict[tuple[int, int], Tensor] = {}

    def run(self, plan: Plan) -> Tensor:
        rig, cache = self.rig, self.rig.cache
        tau_f: dict[int, Tensor] = {}
        tau_t: dict[int, Tensor] = {}
        x, x0 = cache.initial_noise, None
        for i, t in enumerate(rig.scheduler.spec.timesteps()):
            tokens = rig.denoiser.embed(x)
            for b, block in enumerate(rig.denoiser.blocks):
                kind = int(rig.kinds[b])
                match Reuse(int(plan[i, b])):
                    case Reuse.COMPUTE:
                        y = block(tokens, conditioning_anew(rig.denoiser, b, t, rig.features))
                        tau_f[kind] = tau_t[b] = self.tau_r[i, b] = y
                    case Reuse.FORWARD:
                        y = tau_f[kind]
                    case Reuse.TIMESTEP:
                        y = tau_t[b]
                    case Reuse.ROLLOUT:
                        y = self.tau_r[i, b]
                tokens = tokens + y
            noise = cache.noise_of(i)
            x, x0 = rig.scheduler.step(i, x, rig.denoiser.predict(tokens), noise, x0)
        return x


@pytest.mark.parametrize('name', ARCHITECTURES)
@pytest.mark.parametrize('kind', sorted(SCHEDULERS))
@torch.no_grad()
def test_sparsity_zero_is_bitwise_the_plain_dense_loop(kind: str, name: str) -> None:
    rig = Rig(kind, name=name)
    for tick in range(2):
        rig.observe(tick)
        plan = rig.plan(np.random.default_rng(tick), 0.0)
        assert torch.equal(rig.masked(plan), rig.dense())


@given(
    seed=st.integers(0, 2**32 - 1),
    sparsities=st.lists(st.floats(0.1, 1 - 1 / STEPS), min_size=2, max_size=4),
    force=st.booleans(),
    kind=st.sampled_from(['ddpm', 'ddim', 'dpm_solver', 'flow']),
    batch=st.integers(1, 3),
    name=st.sampled_from(ARCHITECTURES),
)
@settings(max_examples=40, deadline=None)
@torch.no_grad()
def test_masked_loop_equals_the_naive_loop_over_any_plans(
    seed: int, sparsities: list[float], force: bool, kind: str, batch: int, name: str
) -> None:
    rig = Rig(kind, batch, name)
    naive = NaiveLoop(rig)
    rng = np.random.default_rng(seed)
    for tick, sparsity in enumerate([0.0, *sparsities]):
        rig.observe(tick)
        plan = rig.plan(rng, sparsity, force)
        expected = naive.run(plan)
        limit = 2e-5 * max(1.0, float(expected.abs().max()))
        assert (rig.masked(plan) - expected).abs().max() < limit


@pytest.mark.parametrize('name', ARCHITECTURES)
@torch.no_grad()
def test_what_is_computed_in_advance_gives_what_training_sees(name: str) -> None:
    rig = Rig('ddim', batch=2, name=name)
    rig.observe(0)
    noisy = torch.randn(2, 8, 3)
    for step, t in enumerate(rig.scheduler.spec.timesteps()):
        tokens = rig.denoiser.embed(noisy)
        for b, block in enumerate(rig.denoiser.blocks):
            tokens = tokens + block(tokens, rig.conditioner.conditioning(step, b))
        plain = rig.denoiser(noisy, torch.full((2,), t), rig.features)
        assert (rig.denoiser.predict(tokens) - plain).abs().max() < 1e-5


@given(seed=st.integers(0, 2**32 - 1), sparsity=st.floats(0.1, 0.8))
@settings(max_examples=10, deadline=None)
def test_gradients_are_those_of_the_naive_loop(seed: int, sparsity: float) -> None:
    rig, rng = Rig('ddim', batch=2), np.random.default_rng(seed)
    naive = NaiveLoop(rig)
    weights = rig.denoiser.blocks[0].out.weight.requires_grad_()
    gradients: list[Tensor] = []
    for run in (rig.masked, naive.run):
        rig.observe(0)
        with torch.no_grad():
            run(dense_plan(STEPS, rig.cache.blocks))
    rig.observe(1)
    plan = rig.plan(rng, sparsity, force=True)
    for run in (naive.run, rig.masked):
        gradients += torch.autograd.grad(run(plan).sum(), weights)
    expected, gradient = gradients
    assert (gradient - expected).abs().max() <= 1e-4 * max(1.0, float(expected.abs().max()))
    assert not rig.cache.store.requires_grad


@torch.no_grad()
def test_a_batch_is_its_sequences_one_by_one() -> None:
    together, alone = Rig(batch=3), Rig()
    rng = np.random.default_rng(0)
    together.observe(0)
    together.masked(dense_plan(STEPS, together.cache.blocks))
    kept = together.cache.features.clone()
    features = torch.randn(3, 2, 7)
    together.conditioner.encode(features)
    plan = together.plan(rng, 0.6)
    expected = together.masked(plan)
    for n in range(3):
        alone.cache.features.copy_(kept[:, :, n : n + 1])
        alone.cache.initial_noise.copy_(together.cache.initial_noise[n : n + 1])
        alone.cache.step_noise.copy_(together.cache.step_noise[:, n : n + 1])
        alone.conditioner.encode(features[n : n + 1])
        assert (alone.masked(plan)[0] - expected[n]).abs().max() < 1e-5


@torch.no_grad()
def test_dense_loop_equals_torch_transformer_decoder_with_per_step_encoding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / 'bench')
    from upstream import decoder_of

    rig = Rig()
    assert isinstance(rig.denoiser, TransformerDenoiser)
    rig.observe(0)
    decoder = decoder_of(rig.denoiser)
    x = rig.cache.initial_noise
    encoder = rig.denoiser.encoder
    causal = torch.zeros(8, 8).masked_fill(~rig.denoiser.self_mask, float('-inf'))
    visible = torch.zeros(8, 3).masked_fill(~rig.denoiser.memory_mask, float('-inf'))
    for i, t in enumerate(rig.scheduler.spec.timesteps()):
        time = encoder.time_tokens(torch.tensor([t]))[:, None]
        memory = torch.cat([time, encoder.observation_tokens(rig.features)], dim=1)
        tokens = decoder(rig.denoiser.embed(x), memory, tgt_mask=causal, memory_mask=visible)
        noise = rig.cache.step_noise[i]
        x, _ = rig.scheduler.step(i, x, rig.denoiser.predict(tokens), noise)
    assert (x - rig.dense()).abs().max() < 1e-5


def attention_flops(spec: DenoiserSpec, plan: Plan) -> int:
    """FLOPs of attention itself, which torch's counter takes for nothing on a CPU."""
    tokens, computed = spec.horizon, (plan == Reuse.COMPUTE).sum(axis=0)
    seen = {SELF_ATTENTION: tokens, CROSS_ATTENTION: 1 + spec.obs_steps}
    columns = [seen.get(block.kind, 0) for block in spec.stack.blocks]
    return int(4 * tokens * spec.width * (computed @ np.array(columns)))


@pytest.mark.parametrize('name', ['transformer', 'dit'])
@torch.no_grad()
def test_skipped_blocks_do_not_execute_and_flops_are_those_of_the_plan(name: str) -> None:
    rig = Rig(name=name)
    spec = rig.denoiser.spec
    with FlopCounterMode(display=False) as counter:
        rig.observe(0)
    assert counter.get_total_flops() == spec.conditioner_flops(STEPS)
    rig.masked(dense_plan(STEPS, spec.blocks))
    plan = rig.plan(np.random.default_rng(0), 0.7, True)
    assert set(np.unique(plan)) == {0, 1, 2, 3}
    calls: Counter[nn.Module] = Counter()
    for block in rig.denoiser.blocks:
        block.register_forward_hook(lambda module, *_: calls.update([module]))
    with FlopCounterMode(display=False) as counter:
        rig.masked(plan)
    executed = [calls[block] for block in rig.denoiser.blocks]
    assert executed == (plan == Reuse.COMPUTE).sum(axis=0).tolist()
    counted, attention = spec.decoder_flops(plan), attention_flops(spec, plan)
    assert 0 < attention < counted
    assert counter.get_total_flops() == counted - attention
