# SPDX-License-Identifier: Apache-2.0
"""The masked loop against the plain dense loop, against a naive loop, and what it executes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_rig import CPU, SCHEDULERS, SIZES, STEPS, random_denoiser, random_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tts_policy.policy import flops
from tts_policy.policy.denoisers.transformer import TransformerDenoiser, TransformerSpec
from tts_policy.policy.engines.eager import MaskedLoop, denoise_dense
from tts_policy.policy.feature_cache import FeatureCache
from tts_policy.policy.plan import Plan, Reuse, dense_plan, make_plan

SPEC = TransformerSpec(**SIZES)


class Rig:
    """A random denoiser with what sampling a batch of sequences needs."""

    def __init__(self, kind: str = 'ddpm', batch: int = 1) -> None:
        denoiser = random_denoiser()
        assert isinstance(denoiser, TransformerDenoiser)
        self.denoiser, self.batch = denoiser, batch
        self.scheduler = SCHEDULERS[kind].make()
        self.memory = denoiser.conditioner(self.scheduler.spec.timesteps())
        self.cache = FeatureCache(SPEC, STEPS, self.scheduler.needs_noise, CPU, batch=batch)
        self.cache.reset(torch.Generator().manual_seed(3))

    def observe(self, tick: int) -> None:
        generator = torch.Generator().manual_seed(tick)
        self.memory.encode(torch.randn(self.batch, 2, 7, generator=generator))

    def loop(self) -> MaskedLoop:
        return MaskedLoop(self.denoiser, self.scheduler, self.memory, self.cache)

    def dense(self) -> Tensor:
        return denoise_dense(self.denoiser, self.scheduler, self.memory, self.cache)

    def masked(self, plan: Plan) -> Tensor:
        x = self.loop().run(plan)
        self.cache.commit(plan)
        return x

    def plan(self, rng: np.random.Generator, sparsity: float, force: bool = False) -> Plan:
        logits, valid = random_logits(rng, self.cache), self.cache.rollout_valid(100)
        return make_plan(logits, sparsity, valid, force, SPEC.stack.kinds)


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
        for i in range(rig.scheduler.spec.steps):
            tokens = rig.denoiser.embed(x)
            memory = rig.memory.rows()[:, i]
            for b, block in enumerate(rig.denoiser.blocks):
                match Reuse(int(plan[i, b])):
                    case Reuse.COMPUTE:
                        masks = rig.denoiser.self_mask, None, None
                        cross = rig.denoiser.conditioning(b // 3, memory)
                        y = block(tokens, cross if b % 3 == 1 else masks[b % 3])
                        tau_f[b % 3] = tau_t[b] = self.tau_r[i, b] = y
                    case Reuse.FORWARD:
                        y = tau_f[b % 3]
                    case Reuse.TIMESTEP:
                        y = tau_t[b]
                    case Reuse.ROLLOUT:
                        y = self.tau_r[i, b]
                tokens = tokens + y
            noise = cache.noise_of(i)
            x, x0 = rig.scheduler.step(i, x, rig.denoiser.predict(tokens), noise, x0)
        return x


@pytest.mark.parametrize('kind', sorted(SCHEDULERS))
@torch.no_grad()
def test_sparsity_zero_is_bitwise_the_plain_dense_loop(kind: str) -> None:
    rig = Rig(kind)
    for tick in range(3):
        rig.observe(tick)
        plan = rig.plan(np.random.default_rng(tick), 0.0)
        assert torch.equal(rig.masked(plan), rig.dense())


@given(
    seed=st.integers(0, 2**32 - 1),
    sparsities=st.lists(st.floats(0.1, 1 - 1 / STEPS), min_size=2, max_size=4),
    force=st.booleans(),
    kind=st.sampled_from(['ddpm', 'ddim', 'dpm_solver']),
    batch=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
@torch.no_grad()
def test_masked_loop_equals_the_naive_loop_over_any_plans(
    seed: int, sparsities: list[float], force: bool, kind: str, batch: int
) -> None:
    rig = Rig(kind, batch)
    naive = NaiveLoop(rig)
    rng = np.random.default_rng(seed)
    for tick, sparsity in enumerate([0.0, *sparsities]):
        rig.observe(tick)
        plan = rig.plan(rng, sparsity, force)
        assert (rig.masked(plan) - naive.run(plan)).abs().max() < 1e-5


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
            run(dense_plan(STEPS, SPEC.blocks))
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
    together.masked(dense_plan(STEPS, SPEC.blocks))
    kept = together.cache.features.clone()
    features = torch.randn(3, 2, 7)
    together.memory.encode(features)
    plan = together.plan(rng, 0.6)
    expected = together.masked(plan)
    for n in range(3):
        alone.cache.features.copy_(kept[:, :, n : n + 1])
        alone.cache.initial_noise.copy_(together.cache.initial_noise[n : n + 1])
        alone.cache.step_noise.copy_(together.cache.step_noise[:, n : n + 1])
        alone.memory.encode(features[n : n + 1])
        assert (alone.masked(plan)[0] - expected[n]).abs().max() < 1e-5


@torch.no_grad()
def test_plans_of_the_property_test_use_every_class() -> None:
    rig = Rig()
    rig.observe(0)
    rig.masked(dense_plan(STEPS, SPEC.blocks))
    plan = rig.plan(np.random.default_rng(0), 0.7, True)
    assert set(np.unique(plan)) == {0, 1, 2, 3}


@torch.no_grad()
def test_dense_loop_equals_torch_transformer_decoder_with_per_step_encoding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / 'bench')
    from upstream import decoder_of

    rig = Rig()
    rig.observe(0)
    decoder = decoder_of(rig.denoiser)
    x = rig.cache.initial_noise
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 2, 7, generator=generator)
    encoder = rig.denoiser.encoder
    causal = torch.zeros(8, 8).masked_fill(~rig.denoiser.self_mask, float('-inf'))
    visible = torch.zeros(8, 3).masked_fill(~rig.denoiser.memory_mask, float('-inf'))
    for i, t in enumerate(rig.scheduler.spec.timesteps()):
        time = encoder.time_tokens(torch.tensor([t]))[:, None]
        memory = torch.cat([time, encoder.observation_tokens(features)], dim=1)
        tokens = decoder(rig.denoiser.embed(x), memory, tgt_mask=causal, memory_mask=visible)
        noise = rig.cache.step_noise[i]
        x, _ = rig.scheduler.step(i, x, rig.denoiser.predict(tokens), noise)
    assert (x - rig.dense()).abs().max() < 1e-5


class _Calls:
    """Counts the forward calls of every block through torch's own hooks."""

    def __init__(self, denoiser: TransformerDenoiser) -> None:
        self.count = np.zeros(len(denoiser.blocks), int)
        for index, block in enumerate(denoiser.blocks):
            block.register_forward_hook(self._counter(index))

    def _counter(self, index: int) -> Any:
        def hook(*_: Any) -> None:
            self.count[index] += 1

        return hook


@torch.no_grad()
def test_skipped_blocks_do_not_execute_and_flops_are_those_of_the_plan() -> None:
    rig = Rig()
    rig.observe(0)
    rig.masked(dense_plan(STEPS, SPEC.blocks))
    rig.observe(1)
    plan = rig.plan(np.random.default_rng(0), 0.7, True)
    calls = _Calls(rig.denoiser)
    with FlopCounterMode(display=False) as counter:
        rig.masked(plan)
    assert calls.count.tolist() == (plan == Reuse.COMPUTE).sum(axis=0).tolist()
    counted = flops.decoder_flops(SPEC, plan)
    # torch's counter sees the matrix products; CPU attention counts as zero there.
    attention = _attention_flops(plan)
    assert counter.get_total_flops() == counted - attention
    assert 0 < attention < counted


def _attention_flops(plan: NDArray) -> int:
    computed = (plan == Reuse.COMPUTE).sum(axis=0)
    tokens, memory = SPEC.horizon, 1 + SPEC.obs_steps
    return int(
        4 * tokens * SPEC.width * (computed[0::3].sum() * tokens + computed[1::3].sum() * memory)
    )


@torch.no_grad()
def test_conditional_encoder_flops_are_those_executed() -> None:
    rig = Rig()
    with FlopCounterMode(display=False) as counter:
        rig.observe(0)
    assert counter.get_total_flops() == SPEC.conditioner_flops(steps=1)


@torch.no_grad()
def test_memory_rows_are_the_time_token_of_the_step_beside_the_observation() -> None:
    rig = Rig()
    rig.observe(0)
    rows = rig.memory.rows()
    assert rows.shape == (1, STEPS, 3, 32)
    assert torch.equal(rows[0, 2, 0], rig.memory.time_tokens[2])
    assert torch.equal(rows[0, 0, 1:], rows[0, 5, 1:])
