# SPDX-License-Identifier: Apache-2.0
"""The modulated transformer and flow matching: the same sparse engine over another stack."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from engine_rig import SIZES
from numpy.typing import NDArray
from small_policy import CONTRACT

from tts_policy.policy.bundle import BundleError, load_bundle, save_bundle, save_random_bundle
from tts_policy.policy.denoisers.attention import rotary_angles, rotate
from tts_policy.policy.denoisers.dit import DiTDenoiser, DiTOptions, DiTSpec
from tts_policy.policy.encoders.cnn import CnnSpec
from tts_policy.policy.network import NetworkSpec
from tts_policy.policy.policy import TestTimeSparsePolicy
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.policy.schedulers.scheduler import SchedulerSpec

SPEC = DiTSpec(**SIZES, time_features=16)
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
