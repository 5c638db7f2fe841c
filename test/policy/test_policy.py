# SPDX-License-Identifier: Apache-2.0
"""The policy over ticks: the knob, what reset forgets, held noise, and bad windows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_policy import CONTRACT, NETWORK, SAMPLERS

from tts_policy.policy.bundle import Bundle, BundleError, load_bundle, save_random_bundle
from tts_policy.policy.denoisers.transformer import TransformerSpec
from tts_policy.policy.feature_cache import FeatureCache
from tts_policy.policy.plan import Reuse
from tts_policy.policy.policy import TestTimeSparsePolicy, WindowError
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.policy.schedulers.scheduler import SchedulerSpec

Windows = list[dict[str, NDArray[Any]]]


def test_first_tick_is_dense_and_later_ticks_meet_the_sparsity(
    bundle: Path, windows: Windows
) -> None:
    policy = TestTimeSparsePolicy.from_bundle(bundle, 'ddim5')
    sparsity = [policy.act(window, 0.6).stats.sparsity for window in windows[:3]]
    assert sparsity == [0.0, pytest.approx(0.6), pytest.approx(0.6)]


def test_the_knob_takes_effect_at_the_next_tick(bundle: Path, windows: Windows) -> None:
    policy = TestTimeSparsePolicy.from_bundle(bundle, 'ddpm20')
    policy.act(windows[0], 0.9)
    chunks = [
        policy.act(window, s) for window, s in zip(windows[1:4], [0.5, 0.0, 0.9], strict=True)
    ]
    assert [chunk.stats.sparsity for chunk in chunks] == pytest.approx([0.5, 0.0, 0.9])
    flops = [chunk.stats.flops for chunk in chunks]
    assert flops[2] < flops[0] < flops[1] == chunks[1].stats.dense_flops
    assert sum(chunks[0].stats.reuse_mix.values()) == pytest.approx(1.0)


@pytest.mark.parametrize('sampler', ['ddim5', 'ddpm20'])
def test_after_reset_nothing_of_the_old_episode_is_read(
    bundle: Path, windows: Windows, sampler: str
) -> None:
    used = TestTimeSparsePolicy.from_bundle(bundle, sampler)
    for window in windows:
        used.act(window, 0.6)
    used.reset(seed=7)
    # The store is NaN after a reset: a cached feature that were read would show in the action.
    assert torch.isnan(used._sampler.cache.features).all()
    fresh = TestTimeSparsePolicy.from_bundle(bundle, sampler)
    fresh.reset(seed=7)
    for window in windows[:3]:
        after, expected = used.act(window, 0.6), fresh.act(window, 0.6)
        assert np.array_equal(after.actions, expected.actions)
        assert np.array_equal(after.plan, expected.plan)
        assert after.stats.oldest_rollout_ticks == expected.stats.oldest_rollout_ticks


@pytest.mark.parametrize('sampler', ['ddim5', 'ddpm20', 'dpm5'])
def test_every_engine_gives_the_same_chunks(
    tmp_path: Path, windows: Windows, sampler: str
) -> None:
    dpm = SamplerSpec(SchedulerSpec('dpm_solver', 5, 20), False, recommended_sparsity=0.6)
    save_random_bundle(tmp_path, CONTRACT, {**SAMPLERS, 'dpm5': dpm}, NETWORK, seed=1)
    eager, packed = (
        TestTimeSparsePolicy.from_bundle(tmp_path, sampler, engine=engine)
        for engine in ('eager', 'packed')
    )
    for window in windows:
        expected, chunk = eager.act(window, 0.6), packed.act(window, 0.6)
        assert np.array_equal(chunk.plan, expected.plan)
        assert np.abs(chunk.actions - expected.actions).max() < 1e-4


def test_noise_is_held_within_an_episode_and_drawn_anew_by_reset(
    bundle: Path, windows: Windows
) -> None:
    policy = TestTimeSparsePolicy.from_bundle(bundle, 'ddpm20')
    first, again = (policy.act(windows[0], 0.0).actions for _ in range(2))
    assert np.array_equal(first, again)
    policy.reset()
    assert not np.array_equal(policy.act(windows[0], 0.0).actions, first)


def test_at_temperature_0_a_chunk_depends_on_its_observation_alone(
    bundle: Path, windows: Windows
) -> None:
    loaded = load_bundle(bundle)
    for name, (spec, pruner) in loaded.samplers.items():
        samplers = {name: (replace(spec, temperature=0.0), pruner)}
        policy = TestTimeSparsePolicy(Bundle(loaded.name, loaded.network, samplers), name)
        policy.reset(1)
        first = policy.act(windows[0], 0.0).actions
        policy.reset(2)
        again = [policy.act(window, 0.0).actions for window in (windows[1], windows[0])][1]
        assert np.array_equal(first, again)


def test_temperature_scales_initial_and_step_noise() -> None:
    spec = TransformerSpec(3, 8, 2, 7, width=32, layers=1, heads=2)
    whole, half = (
        FeatureCache(spec, 5, True, torch.device('cpu'), temperature=temperature)
        for temperature in (1.0, 0.5)
    )
    for cache in (whole, half):
        cache.reset(torch.Generator().manual_seed(0))
    assert torch.equal(half.initial_noise, 0.5 * whole.initial_noise)
    assert torch.equal(half.step_noise, 0.5 * whole.step_noise)
    assert whole.step_noise.std() > 0.5


def test_without_hold_noise_every_tick_draws_its_own(bundle: Path, windows: Windows) -> None:
    loaded = load_bundle(bundle)
    spec, pruner = loaded.sampler('ddim5')
    samplers = {'ddim5': (replace(spec, hold_noise=False), pruner)}
    policy = TestTimeSparsePolicy(Bundle(loaded.name, loaded.network, samplers), 'ddim5')
    first, again = (policy.act(windows[0], 0.0).actions for _ in range(2))
    assert not np.array_equal(first, again)


def test_rollout_reuse_is_bounded_by_the_maximum_age(bundle: Path, windows: Windows) -> None:
    loaded = load_bundle(bundle)
    spec, pruner = loaded.sampler('ddim5')
    assert pruner is not None
    with torch.no_grad():
        pruner.tables[..., Reuse.ROLLOUT] = 100.0
        pruner.tables[..., Reuse.COMPUTE] = torch.linspace(101, 99, 30).view(5, 6)
    samplers = {'ddim5': (replace(spec, max_rollout_age=2), pruner)}
    policy = TestTimeSparsePolicy(Bundle(loaded.name, loaded.network, samplers), 'ddim5')
    plans = []
    for window in windows[:5]:
        chunk = policy.act(window, 0.8)
        plans.append(chunk.plan)
        assert chunk.stats.oldest_rollout_ticks <= 2
    assert (plans[1] == Reuse.ROLLOUT).sum() == (plans[2] == Reuse.ROLLOUT).sum() == 24
    # At the third tick after it the dense tick's features are too old for any reuse.
    assert (plans[3] == Reuse.ROLLOUT).sum() < 24


def test_same_seed_gives_bitwise_the_same_chunks(bundle: Path, windows: Windows) -> None:
    runs = []
    for _ in range(2):
        policy = TestTimeSparsePolicy.from_bundle(bundle, 'ddim5', seed=3)
        runs.append([policy.act(window, 0.6).actions for window in windows])
    assert all(np.array_equal(a, b) for a, b in zip(*runs, strict=True))


def test_actions_start_at_the_newest_observation(bundle: Path, windows: Windows) -> None:
    chunk = TestTimeSparsePolicy.from_bundle(bundle).act(windows[0], 0.0)
    assert chunk.actions.shape == (7, 3) and chunk.actions.dtype == np.float64


@pytest.mark.parametrize(
    ('value', 'reason'),
    [
        (1.5, r'in \[0, 0\.8\].*1 - 1/5 steps.*got 1\.5'),
        (0.81, r'in \[0, 0\.8\].*got 0\.81'),
        (-0.1, r'got -0\.1'),
        (float('nan'), 'got nan'),
        ('high', "sparsity: expected a number, got 'high'"),
        (True, 'sparsity: expected a number, got True'),
    ],
)
def test_sparsity_out_of_range_is_refused_and_changes_nothing(
    bundle: Path, windows: Windows, value: Any, reason: str
) -> None:
    policy = TestTimeSparsePolicy.from_bundle(bundle, 'ddim5', seed=3)
    twin = TestTimeSparsePolicy.from_bundle(bundle, 'ddim5', seed=3)
    for both in (policy, twin):
        both.act(windows[0], 0.6)
    with pytest.raises(ValueError, match=reason):
        policy.act(windows[1], value)
    assert np.array_equal(policy.act(windows[1], 0.6).actions, twin.act(windows[1], 0.6).actions)


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        ({'camera': None}, r"window: expected \['camera', 'joints'\], got \['joints'\]"),
        (
            {'camera': np.zeros((2, 32, 32, 3), np.uint8)},
            r'camera: expected uint8 \(2, 32, 48, 3\)',
        ),
        ({'camera': np.zeros((2, 32, 48, 3))}, 'got float64'),
        ({'joints': np.zeros((2, 4))}, r'joints: expected \(2, 3\), got \(2, 4\)'),
        ({'joints': np.full((2, 3), np.nan)}, 'joints: expected finite'),
    ],
)
def test_windows_off_the_contract_are_refused(
    bundle: Path, windows: Windows, change: dict[str, Any], reason: str
) -> None:
    window = {k: v for k, v in {**windows[0], **change}.items() if v is not None}
    with pytest.raises(WindowError, match=reason):
        TestTimeSparsePolicy.from_bundle(bundle).act(window, 0.0)


def test_unknown_samplers_devices_and_engines_are_refused(bundle: Path) -> None:
    with pytest.raises(BundleError, match="expected one of ddim5, ddpm20, got 'euler'"):
        TestTimeSparsePolicy.from_bundle(bundle, 'euler')
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='without CUDA'):
            TestTimeSparsePolicy.from_bundle(bundle, device='cuda')
    for device in ('gpu', 'meta', 'cuda:1', 'cpu:x', ''):
        with pytest.raises(ValueError, match=f'device: expected one of .*, got {device!r}'):
            TestTimeSparsePolicy.from_bundle(bundle, device=device)
    with pytest.raises(ValueError, match='engine: expected one of auto, eager, packed'):
        TestTimeSparsePolicy.from_bundle(bundle, engine='warp')


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_cuda_matches_the_cpu(bundle: Path, windows: Windows) -> None:
    chunks = []
    for device in ('cpu', 'cuda'):
        policy = TestTimeSparsePolicy.from_bundle(bundle, 'ddpm20', device=device, seed=3)
        chunks.append([policy.act(window, 0.7) for window in windows])
    for cpu, cuda in zip(*chunks, strict=True):
        assert np.array_equal(cpu.plan, cuda.plan)
        assert np.abs(cpu.actions - cuda.actions).max() < 1e-4


def test_a_flipped_image_is_the_image_it_shows(bundle: Path, windows: Windows) -> None:
    key = next(name for name in windows[0] if name != 'joints')
    flipped = {**windows[0], key: windows[0][key][:, ::-1]}
    copied = {**flipped, key: flipped[key].copy()}
    actions = [
        TestTimeSparsePolicy.from_bundle(bundle, seed=3).act(window, 0.0).actions
        for window in (flipped, copied)
    ]
    assert np.array_equal(*actions)
