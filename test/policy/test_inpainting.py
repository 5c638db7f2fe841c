# SPDX-License-Identifier: Apache-2.0
"""Committed actions: held exactly by every engine, refused when they do not fit, free when off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from engine_rig import SCHEDULERS, STEPS, Run, random_features, random_logits
from numpy.typing import NDArray
from torch import Tensor

from tts_policy.policy.contract import CommittedActions
from tts_policy.policy.engines.eager import EagerEngine
from tts_policy.policy.engines.packed import PackedEngine
from tts_policy.policy.inpainting import Inpainting
from tts_policy.policy.policy import TestTimeSparsePolicy
from tts_policy.policy.schedulers.scheduler import SchedulerSpec

Windows = list[dict[str, NDArray]]


@pytest.mark.parametrize('kind', ['ddpm', 'ddim', 'ddim_sample'])
@pytest.mark.parametrize('force', [True, False])
@torch.inference_mode()
def test_every_engine_holds_committed_actions_and_agrees_on_the_rest(
    kind: str, force: bool
) -> None:
    rng = np.random.default_rng(0)
    actions = torch.from_numpy(rng.standard_normal((8, 3), np.float32))
    weights = torch.tensor([0.0, 1.0, 1.0, 0.5, 0.1, 0.0, 0.0, 0.0])
    runs = [Run(make, kind, force) for make in (EagerEngine, PackedEngine)]
    features, logits = random_features(rng), random_logits(rng, runs[0].cache)
    results: list[list[Tensor]] = []
    for run in runs:
        x = [
            run.tick(features, logits, sparsity, (actions, weights) if held else None)[0].clone()
            for sparsity, held in ((0.0, False), (0.6, True), (0.6, False))
        ]
        assert torch.equal(x[1][1:3], actions[1:3])
        assert not torch.allclose(x[2][1:3], actions[1:3])
        results.append(x)
    for expected, x in zip(*results, strict=True):
        assert (x - expected).abs().max() < 1e-4


def test_a_level_is_the_known_action_noised_as_its_step_asks() -> None:
    scheduler = SCHEDULERS['ddim'].make()
    noise, actions = torch.randn(1, 8, 3), torch.randn(8, 3)
    given = Inpainting.of(torch.tensor(scheduler.noise_levels()), noise, actions, torch.ones(8))
    alphas = scheduler.spec.alphas_cumprod()
    for level, t in enumerate(scheduler.spec.timesteps()):
        x = torch.zeros(1, 8, 3)
        given.impose(level, x)
        expected = alphas[t] ** 0.5 * actions + (1 - alphas[t]) ** 0.5 * noise
        assert torch.allclose(x, expected.float(), atol=1e-6)


def test_a_level_of_a_flow_lies_between_noise_and_the_known_action() -> None:
    scheduler = SchedulerSpec('flow', STEPS, 1, prediction='velocity', clip=0.0).make()
    noise, actions = torch.randn(1, 8, 3), torch.randn(8, 3)
    given = Inpainting.of(torch.tensor(scheduler.noise_levels()), noise, actions, torch.ones(8))
    x = noise.clone()
    for level in range(STEPS):
        given.impose(level, x)
        assert torch.allclose(x, torch.lerp(noise, actions, level / STEPS), atol=1e-6)
        # A network that knows the action moves from level to level by itself.
        x, _ = scheduler.step(level, x, actions - noise)
    assert torch.allclose(x, actions, atol=1e-6)


@pytest.mark.parametrize('sampler', ['ddim5', 'ddpm20'])
def test_a_chunk_continues_committed_actions_in_robot_units(
    bundle: Path, windows: Windows, sampler: str
) -> None:
    free, held = (TestTimeSparsePolicy.from_bundle(bundle, sampler) for _ in range(2))
    assert np.array_equal(free.act(windows[0], 0.0).actions, held.act(windows[0], 0.0).actions)
    given = CommittedActions(np.full((4, 3), 0.25), np.array([1.0, 1.0, 0.4, 0.1]))
    expected, chunk = free.act(windows[1], 0.5), held.act(windows[1], 0.5, given)
    assert np.allclose(chunk.actions[:2], 0.25, atol=1e-6)
    assert not np.allclose(chunk.actions[2:], expected.actions[2:])


@pytest.mark.parametrize(
    ('actions', 'weights', 'reason'),
    [
        (np.zeros((8, 3)), np.ones(8), r'n at most 7, got \(8, 3\)'),
        (np.zeros((2, 2)), np.ones(2), r'\[n, 3\] with a weight each'),
        (np.full((2, 3), np.nan), np.ones(2), 'finite'),
        (np.zeros((2, 3)), np.full(2, 1.5), r'weights in \[0, 1\]'),
    ],
)
def test_committed_actions_that_do_not_fit_are_refused(
    bundle: Path, windows: Windows, actions: NDArray, weights: NDArray, reason: str
) -> None:
    policy = TestTimeSparsePolicy.from_bundle(bundle, 'ddim5')
    with pytest.raises(ValueError, match=reason):
        policy.act(windows[0], 0.0, CommittedActions(actions, weights))
