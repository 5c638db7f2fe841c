# SPDX-License-Identifier: Apache-2.0
"""The modulated transformer and flow matching: the same sparse engine over another stack."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_rig import CPU, SIZES, STEPS, random_denoiser, random_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_policy import CONTRACT
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tts_policy.policy import flops
from tts_policy.policy.bundle import BundleError, load_bundle, save_bundle, save_random_bundle
from tts_policy.policy.denoisers.attention import rotary_angles, rotate
from tts_policy.policy.denoisers.dit import DiTDenoiser, DiTOptions, DiTSpec
from tts_policy.policy.encoders.cnn import CnnSpec
from tts_policy.policy.engines.eager import MaskedLoop, denoise_dense
from tts_policy.policy.feature_cache import FeatureCache
from tts_policy.policy.network import NetworkSpec
from tts_policy.policy.plan import Plan, Reuse, dense_plan, make_plan
from tts_policy.policy.policy import TestTimeSparsePolicy
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.policy.schedulers.flow import flow_targets
from tts_policy.policy.schedulers.scheduler import SchedulerSpec

SPEC = DiTSpec(**SIZES, time_features=16)
FLOW = SchedulerSpec('flow', STEPS, prediction='velocity', clip=0.0)
NETWORK = NetworkSpec(
    width=32,
    layers=2,
    heads=2,
    encoder=CnnSpec(16),
    denoiser=DiTOptions(time_features=16, learned_position=True),
    objective='flow',
)
SAMPLERS = {
    'flow5': SamplerSpec(
        SchedulerSpec('flow', 5, prediction='velocity'), False, recommended_sparsity=0.6
    )
}


class Rig:
    """A random denoiser with what sampling it needs."""

    def __init__(self) -> None:
        denoiser = random_denoiser('dit')
        assert isinstance(denoiser, DiTDenoiser)
        self.denoiser, self.scheduler = denoiser, FLOW.make()
        self.table = denoiser.conditioner(FLOW.timesteps())
        self.cache = FeatureCache(SPEC, STEPS, self.scheduler.needs_noise, CPU)
        self.cache.reset(torch.Generator().manual_seed(3))
        self.features = torch.empty(0)

    def observe(self, tick: int) -> None:
        self.features = torch.randn(1, 2, 7, generator=torch.Generator().manual_seed(tick))
        self.table.encode(self.features)

    def masked(self, plan: Plan) -> Tensor:
        x = MaskedLoop(self.denoiser, self.scheduler, self.table, self.cache).run(plan)
        self.cache.commit(plan)
        return x

    def plan(self, rng: np.random.Generator, sparsity: float) -> Plan:
        valid = self.cache.rollout_valid(100)
        return make_plan(random_logits(rng, self.cache), sparsity, valid, False, SPEC.stack.kinds)


def naive(rig: Rig, plan: Plan, earlier: dict[tuple[int, int], Tensor]) -> Tensor:
    """Three caches, one cell at a time, the modulation of every cell formed anew."""
    by_kind: dict[int, Tensor] = {}
    by_block: dict[int, Tensor] = {}
    x = rig.cache.initial_noise
    for i in range(STEPS):
        tokens = rig.denoiser.embed(x)
        time = rig.denoiser.time_features(torch.tensor([i / STEPS]))
        both = torch.cat([time, rig.features.flatten(1)], dim=-1)
        for b, block in enumerate(rig.denoiser.blocks):
            match Reuse(int(plan[i, b])):
                case Reuse.COMPUTE:
                    parts = block.modulation(both * both.sigmoid())[:, None].chunk(3, -1)
                    mean = tokens.mean(-1, keepdim=True)
                    spread = (tokens.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
                    inner = (tokens - mean) / spread * (1 + parts[1]) + parts[0]
                    y = parts[2] * block.branch(inner)
                    by_kind[b % 2] = by_block[b] = earlier[i, b] = y
                case Reuse.FORWARD:
                    y = by_kind[b % 2]
                case Reuse.TIMESTEP:
                    y = by_block[b]
                case Reuse.ROLLOUT:
                    y = earlier[i, b]
            tokens = tokens + y
        x = x + rig.denoiser.predict(tokens) / STEPS
    return x


@given(
    seed=st.integers(0, 2**32 - 1),
    sparsities=st.lists(st.floats(0.0, 1 - 1 / STEPS), min_size=2, max_size=4),
)
@settings(max_examples=30, deadline=None)
@torch.no_grad()
def test_masked_flow_equals_the_naive_loop_over_any_plans(
    seed: int, sparsities: list[float]
) -> None:
    rig, rng = Rig(), np.random.default_rng(seed)
    earlier: dict[tuple[int, int], Tensor] = {}
    for tick, sparsity in enumerate([0.0, *sparsities]):
        rig.observe(tick)
        plan = rig.plan(rng, sparsity)
        assert (rig.masked(plan) - naive(rig, plan, earlier)).abs().max() < 1e-4


@torch.no_grad()
def test_sparsity_zero_is_bitwise_the_plain_dense_loop() -> None:
    rig = Rig()
    for tick in range(2):
        rig.observe(tick)
        dense = denoise_dense(rig.denoiser, rig.scheduler, rig.table, rig.cache)
        assert torch.equal(rig.masked(dense_plan(STEPS, SPEC.blocks)), dense)


@torch.no_grad()
def test_the_folded_table_gives_what_training_sees() -> None:
    rig = Rig()
    rig.observe(0)
    noisy = torch.randn(1, 8, 3)
    for step, t in enumerate(FLOW.timesteps()):
        tokens = rig.denoiser.embed(noisy)
        for b, block in enumerate(rig.denoiser.blocks):
            tokens = tokens + block(tokens, rig.table.conditioning(step, b))
        plain = rig.denoiser(noisy, torch.tensor([t]), rig.features)
        assert (rig.denoiser.predict(tokens) - plain).abs().max() < 1e-5


@torch.no_grad()
def test_a_fresh_network_is_the_identity_in_every_block() -> None:
    torch.manual_seed(0)
    denoiser = DiTDenoiser(SPEC)
    noisy, features = torch.randn(2, 8, 3), torch.randn(2, 2, 7)
    skipped = denoiser.predict(denoiser.embed(noisy))
    assert torch.equal(denoiser(noisy, torch.rand(2), features), skipped)


@torch.no_grad()
def test_rotary_attention_sees_relative_positions_only() -> None:
    spec = DiTSpec(3, 8, 1, 1, width=32, layers=1, heads=2, time_features=16)
    q, k = torch.randn(2, 1, 16)
    angles = rotary_angles(spec.horizon, 16, spec.rotary_base)
    scores = rotate(q.expand(8, -1), angles) @ rotate(k.expand(8, -1), angles).T
    for offset in range(-7, 8):
        diagonal = scores.diagonal(offset)
        assert (diagonal - diagonal[0]).abs().max() < 1e-4


@torch.no_grad()
def test_flops_are_those_of_the_plan_and_of_the_conditioner() -> None:
    rig = Rig()
    with FlopCounterMode(display=False) as counter:
        rig.observe(0)
    assert counter.get_total_flops() == SPEC.conditioner_flops(STEPS)
    rig.masked(dense_plan(STEPS, SPEC.blocks))
    plan = rig.plan(np.random.default_rng(0), 0.6)
    with FlopCounterMode(display=False) as counter:
        rig.masked(plan)
    attention = 4 * 8 * 8 * 32 * int((plan[:, 0::2] == Reuse.COMPUTE).sum())
    assert counter.get_total_flops() == flops.decoder_flops(SPEC, plan) - attention


def test_euler_steps_of_the_true_velocity_end_at_the_data() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(4, 8, 3, generator=generator) * 1.6 - 0.8
    x = noise = torch.randn(4, 8, 3, generator=generator)
    scheduler = SchedulerSpec('flow', 7, prediction='velocity').make()
    for step, t in enumerate(scheduler.spec.timesteps()):
        assert (x - (t * data + (1 - t) * noise)).abs().max() < 1e-5
        x, _ = scheduler.step(step, x, data - noise)
    assert (x - data).abs().max() < 1e-5
    assert not scheduler.needs_noise


def test_without_clip_a_flow_step_adds_the_velocity_and_with_it_the_data_is_bounded() -> None:
    x, velocity = torch.randn(2, 1, 8, 3)
    free, bound = (
        SchedulerSpec('flow', 4, prediction='velocity', clip=c).make() for c in (0.0, 0.5)
    )
    for step in range(4):
        assert torch.allclose(free.step(step, x, velocity)[0], x + velocity / 4, atol=1e-5)
    assert bound.step(3, x, 100 * velocity)[0].abs().max() <= 0.5


def test_lessons_of_a_flow_lie_on_the_line_from_noise_to_data() -> None:
    data = torch.randn(500, 2, 3)
    noisy, t, velocity = flow_targets(data, torch.Generator().manual_seed(0))
    assert torch.allclose(noisy + (1 - t)[:, None, None] * velocity, data, atol=1e-5)
    assert t.min() >= 0.0 and t.max() <= 0.999
    # Mean of 0.999 (1 - u), u ~ Beta(1.5, 1), is 0.4.
    assert t.mean().item() == pytest.approx(0.4, abs=0.04) and not math.isclose(t.mean(), 0.5)


def test_a_bundle_runs_sparse_and_keeps_its_architecture(
    tmp_path: Path, windows: list[dict[str, NDArray]]
) -> None:
    folder = tmp_path / 'bundle'
    save_random_bundle(folder, CONTRACT, SAMPLERS, NETWORK, seed=1)
    bundle = load_bundle(folder)
    assert bundle.network.spec == NETWORK and isinstance(bundle.network.denoiser, DiTDenoiser)
    policy = TestTimeSparsePolicy.from_bundle(folder)
    for tick, window in enumerate(windows[:3]):
        chunk = policy.act(window, 0.6)
        assert np.isfinite(chunk.actions).all()
        assert chunk.stats.sparsity == (0.6 if tick else 0.0)
    assert chunk.stats.flops < 0.5 * chunk.stats.dense_flops


@pytest.mark.parametrize(
    ('scheduler', 'reason'),
    [
        (SchedulerSpec('ddim', 5, 100), "kind: expected flow for objective 'flow', got 'ddim'"),
        (None, "objective: expected 'diffusion' or 'flow', got 'stream'"),
    ],
)
def test_a_sampler_of_another_objective_is_refused(
    tmp_path: Path, scheduler: SchedulerSpec | None, reason: str
) -> None:
    folder = tmp_path / 'bundle'
    save_random_bundle(folder, CONTRACT, SAMPLERS, NETWORK, seed=1)
    network = load_bundle(folder).network
    if scheduler is None:
        file = folder / 'model.yaml'
        file.write_text(file.read_text().replace('objective: flow', 'objective: stream'))
        with pytest.raises(BundleError, match=reason):
            load_bundle(folder)
    else:
        with pytest.raises(BundleError, match=reason):
            save_bundle(folder, 'a', network, {'x': SamplerSpec(scheduler)})


@pytest.mark.parametrize(
    ('field', 'value', 'reason'),
    [
        ('time_features', 15, 'time_features: expected a multiple of 2, got 15'),
        ('rotary', 1, 'rotary: expected true or false, got 1'),
        ('rotary_base', 0.5, 'rotary_base: expected more than 1.0, got 0.5'),
    ],
)
def test_impossible_sizes_are_refused(field: str, value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        DiTSpec(3, 8, 2, 7, width=32, heads=2, **{field: value})  # type: ignore[arg-type]


def test_a_flow_predicts_velocity() -> None:
    with pytest.raises(ValueError, match="prediction: expected 'velocity', got 'epsilon'"):
        SchedulerSpec('flow', 5)
