# SPDX-License-Identifier: Apache-2.0
"""Converted policies compute what a second implementation of their layout computes."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import pytest
import torch
import yaml
from layouts import PublishedPruner, Sizes, lowdim_policy, save_hybrid, save_lowdim
from torch import Tensor, nn

from tts_policy.convert.convert_checkpoint import main
from tts_policy.policy.bundle import load_bundle
from tts_policy.policy.plan import Reuse, make_plan
from tts_policy.policy.policy import TestTimeSparsePolicy

GRID = [
    Sizes(),
    Sizes(causal=False),
    Sizes(layers=3, heads=4, width=64, horizon=5, obs_steps=3, execute=1),
    Sizes(cond_layers=2),
    Sizes(cond_layers=1, causal=False, obs_steps=4, horizon=12),
    Sizes(newest_only=True, causal=False),
    Sizes(scheduler={'prediction_type': 'sample'}),
    Sizes(scheduler={'beta_schedule': 'linear', 'variance_type': 'fixed_large'}),
    Sizes(scheduler={'clip_sample': False, 'beta_schedule': 'scaled_linear'}),
    Sizes(scheduler={'beta_schedule': 'sigmoid', 'clip_sample_range': 2.0}),
]


def _convert(tmp_path: Path, *options: str) -> Path:
    assert main([str(tmp_path / 'a.ckpt'), str(tmp_path / 'out'), *options]) == 0
    return tmp_path / 'out'


def _betas(schedule: str, steps: int) -> Tensor:
    if schedule == 'linear':
        return torch.linspace(1e-4, 0.02, steps)
    if schedule == 'scaled_linear':
        return torch.linspace(0.01, math.sqrt(0.02), steps) ** 2
    if schedule == 'sigmoid':
        return torch.sigmoid(torch.linspace(-6, 6, steps)) * (0.02 - 1e-4) + 1e-4
    bar = [math.cos((n / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for n in range(steps + 1)]
    return torch.tensor([min(1 - bar[n + 1] / bar[n], 0.999) for n in range(steps)])


def _ddpm(
    model: Callable[[Tensor, Tensor], Tensor], x: Tensor, noise: Tensor, options: dict[str, Any]
) -> Tensor:
    """Ho et al. 2020, algorithm 2, with the clean sample clipped; in single precision."""
    bars = torch.cumprod(1 - _betas(options['beta_schedule'], len(noise)), 0)
    for i, t in enumerate(range(len(noise) - 1, -1, -1)):
        prediction = model(x, torch.tensor([t]))
        bar, before = bars[t], bars[t - 1] if t else torch.tensor(1.0)
        beta = 1 - bar / before
        x0 = prediction
        if options['prediction_type'] == 'epsilon':
            x0 = (x - (1 - bar).sqrt() * prediction) / bar.sqrt()
        if options['clip_sample']:
            limit = options.get('clip_sample_range', 1.0)
            x0 = x0.clamp(-limit, limit)
        mean = before.sqrt() * beta / (1 - bar) * x0
        mean = mean + (1 - beta).sqrt() * (1 - before) / (1 - bar) * x
        variance = (
            beta if options['variance_type'] == 'fixed_large' else (1 - before) / (1 - bar) * beta
        )
        x = (mean + (variance.sqrt() * noise[i] if t else 0)).float()
    return x


@pytest.mark.parametrize('sizes', GRID, ids=range(len(GRID)))
def test_a_low_dimensional_policy_gives_the_same_chunk(tmp_path: Path, sizes: Sizes) -> None:
    model, obs, action = save_lowdim(tmp_path / 'a.ckpt', sizes)
    bundle = load_bundle(_convert(tmp_path))
    observed = torch.randn(1, sizes.obs_steps, sizes.obs_dim)
    features = observed * obs.scale + obs.offset
    tokens = sizes.execute if sizes.newest_only else sizes.horizon
    noisy, t = torch.randn(3, tokens, sizes.action_dim), torch.tensor([0, 7, 19])
    with torch.no_grad():
        ours = bundle.network.denoiser(noisy, t, features.expand(3, -1, -1))
        theirs = model(noisy, t, features.expand(3, -1, -1))
    assert torch.allclose(ours, theirs, atol=1e-5)

    policy = TestTimeSparsePolicy(bundle, 'ddpm20')
    cache = policy._sampler.cache
    chunk = policy.act({'joints': observed[0].numpy()}, 0.0)
    with torch.no_grad():
        expected = _ddpm(
            lambda x, t: model(x, t, features),
            cache.initial_noise.clone(),
            cache.step_noise.clone(),
            layouts.noise_scheduler(**sizes.scheduler),
        )
    expected = ((expected - action.offset) / action.scale)[0]
    first = 0 if sizes.newest_only else sizes.obs_steps - 1
    assert np.allclose(chunk.actions, expected[first:].numpy(), atol=1e-4)
    assert bundle.network.contract.action.execute == sizes.execute
    assert bundle.network.contract.action.offset_steps == 0


@pytest.mark.parametrize(
    ('cameras', 'norm', 'crop'),
    [(1, nn.GroupNorm, (33, 37)), (2, nn.GroupNorm, (32, 32)), (1, nn.BatchNorm2d, None)],
)
def test_a_hybrid_policy_sees_the_same(
    tmp_path: Path, cameras: int, norm: type[nn.Module], crop: tuple[int, int] | None
) -> None:
    hybrid = save_hybrid(tmp_path / 'a.ckpt', cameras, norm, crop, fixed=True)
    network = load_bundle(_convert(tmp_path)).network.eval()
    images = {
        key: torch.randint(0, 256, (2, 40, 48, 3), dtype=torch.uint8) for key in hybrid.cores
    }
    pose, grip = torch.randn(2, 3), torch.randn(2, 2)
    assert network.contract.observation.joints == (
        'pose_0',
        'pose_1',
        'pose_2',
        'grip_0',
        'grip_1',
    )
    noisy, t = torch.randn(1, 8, 3), torch.tensor([3])
    with torch.no_grad():
        ours = network.features(
            {key: image[None] for key, image in images.items()}, torch.cat([pose, grip], -1)[None]
        )
        theirs = hybrid.features(images, {'pose': pose, 'grip': grip})[None]
        order = [
            *range(3),
            *range(3 + 64 * cameras, 5 + 64 * cameras),
            *range(3, 3 + 64 * cameras),
        ]
        assert torch.allclose(ours, theirs[..., order], atol=1e-5)
        assert torch.allclose(
            network.denoiser(noisy, t, ours), hybrid.model(noisy, t, theirs), atol=1e-5
        )


def test_the_pruner_of_the_paper_makes_the_same_hard_plan(tmp_path: Path) -> None:
    save_lowdim(tmp_path / 'a.ckpt', Sizes())
    pruner = PublishedPruner(memory_width=32).eval()
    file = pruner.save(tmp_path / 'final_pruner.pth')
    bundle = load_bundle(_convert(tmp_path, '--pruner', str(file)))
    spec, converted = bundle.sampler('ddpm20')
    assert converted is not None
    memory = bundle.network.denoiser.conditioner(spec.scheduler.timesteps())
    seen = set()
    with torch.no_grad():
        gates = converted.gates(memory.time_tokens)
        for _ in range(5):
            memory.encode(torch.randn(1, 2, 5))
            theirs = pruner.logits(memory.rows()[0], blocks=6)
            ours = converted(gates, memory.observation_tokens, 0.5)[0]
            assert torch.allclose(ours, theirs, atol=1e-4)
            hard = theirs.argmax(-1).numpy()
            hard[0] = Reuse.COMPUTE
            share = float((hard != Reuse.COMPUTE).mean())
            kinds = bundle.network.denoiser.spec.stack.kinds
            plan = make_plan(ours.numpy(), share, np.ones(hard.shape, bool), True, kinds)
            assert (plan == hard).all()
            seen |= set(hard.ravel().tolist())
    assert len(seen) > 2
    assert type(bundle.sampler('ddim10')[1]) is not type(converted)


def test_a_converted_bundle_runs_sparse_by_every_sampler(tmp_path: Path) -> None:
    for n, sizes in enumerate((Sizes(), Sizes(cond_layers=1))):
        folder = tmp_path / str(n)
        folder.mkdir()
        save_lowdim(folder / 'a.ckpt', sizes)
        bundle = load_bundle(_convert(folder))
        assert list(bundle.samplers) == ['ddpm20', 'ddim10']
        for sampler in bundle.samplers:
            policy = TestTimeSparsePolicy(bundle, sampler)
            window = {'joints': np.zeros((2, 5))}
            dense = policy.act(window, 0.0)
            sparse = policy.act(window, policy.recommended_sparsity)
            assert sparse.stats.sparsity == pytest.approx(policy.recommended_sparsity, abs=0.02)
            assert sparse.stats.flops < 0.7 * dense.stats.flops
            assert np.isfinite(sparse.actions).all()


def test_averaged_weights_are_taken_unless_the_last_are_asked_for(tmp_path: Path) -> None:
    model, _, _ = save_lowdim(tmp_path / 'a.ckpt', Sizes())
    network = load_bundle(_convert(tmp_path)).network
    assert torch.equal(network.denoiser.head.weight, model.head.weight)
    # The last weights of these files are zero, and so are the scales of their normalisers.
    assert main([str(tmp_path / 'a.ckpt'), str(tmp_path / 'b'), '--weights', 'model']) == 2


def test_without_an_average_the_last_weights_are_to_be_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _, _ = save_lowdim(tmp_path / 'a.ckpt', Sizes(), average=False)
    assert main([str(tmp_path / 'a.ckpt'), str(tmp_path / 'b')]) == 2
    assert 'ema_model: expected weights, got nothing: use --weights' in capsys.readouterr().err
    network = load_bundle(_convert(tmp_path, '--weights', 'model')).network
    assert torch.equal(network.denoiser.head.weight, model.head.weight)


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'module._orig_mod.'])
def test_wrappers_of_training_are_removed_from_names_and_this_is_said(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _, _ = save_lowdim(tmp_path / 'a.ckpt', Sizes(), prefix=prefix)
    network = load_bundle(_convert(tmp_path)).network
    assert torch.equal(network.denoiser.head.weight, model.head.weight)
    assert 'removed module and _orig_mod from the names of weights' in capsys.readouterr().out


def test_names_and_rate_come_from_the_command_line(tmp_path: Path) -> None:
    save_lowdim(tmp_path / 'a.ckpt', Sizes())
    names = ['--observation-joints', *'abcde', '--action-joints', *'xyz', '--rate', '20']
    out = _convert(tmp_path, *names)
    contract = load_bundle(out).network.contract
    assert contract.observation.joints == tuple('abcde') and contract.action.joints == tuple('xyz')
    assert contract.observation.period_s == 0.05
    text = (out / 'parameters.yaml').read_text()
    assert 'joint_states' in text and 'velocity:  # TODO' in text


def test_limits_of_the_draft_are_the_range_of_the_training_actions(tmp_path: Path) -> None:
    _, _, action = save_lowdim(tmp_path / 'a.ckpt', Sizes())
    draft = yaml.safe_load((_convert(tmp_path) / 'parameters.yaml').read_text())
    limits = draft['/**/tts_policy']['ros__parameters']['limits']
    for name, side in (('lower', -1), ('upper', 1)):
        expected = ((side - action.offset) / action.scale).tolist()
        assert limits[name] == pytest.approx(expected, abs=1e-3)


def test_a_random_crop_is_remarked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_hybrid(tmp_path / 'a.ckpt', 1, nn.GroupNorm, (32, 32), fixed=False)
    _convert(tmp_path)
    assert 'centre crop' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        (
            {'_target_': 'x.DiffusionUnetLowdimPolicy'},
            'convolutional U-Nets are not supported yet',
        ),
        ({'obs_as_cond': False}, 'obs_as_cond: expected true, got false'),
        ({'model.time_as_cond': False}, 'encoder-only model has no memory'),
        ({'model.n_layer': 3}, r'decoder\.layers\.2.*: expected a weight, got nothing'),
        ({'model.n_layer': 1}, 'unknown architecture'),
        ({'model.n_emb': 64}, r'weight: expected shape \(64, 5\), got \(32, 5\)'),
        ({'model.n_head': 5}, 'multiple of 2 x heads'),
        ({'model.n_emb': '32'}, r"cfg\.policy\.model\.n_emb: expected an integer, got '32'"),
        ({'model.gain': 2}, r'model\.gain: expected no field of this name, got 2'),
        ({'eta': 0.5}, r'policy\.eta: expected no field of this name, got 0\.5'),
        ({'obs_dim': 10**9}, 'observation: expected 1 to 4096 values, got 1000000000'),
        ({'action_dim': 10**9}, 'action: expected 1 to 4096 values, got 1000000000'),
        ({'action_dim': 0}, 'action: expected 1 to 4096 values, got 0'),
        ({'horizon': 10**9}, r'action\.horizon: expected at most 1024, got 1000000000'),
        ({'model.n_layer': 10**9}, r'network\.layers: expected at most 16384'),
        ({'model.n_cond_layers': 10**9}, r'cond_layers: expected at most 16384'),
        (
            {'noise_scheduler.num_train_timesteps': 10**9},
            'train_steps: expected at most 10000, got 1000000000',
        ),
        ({'n_action_steps': 8}, 'execute: expected at most .* 7, got 8'),
        ({'noise_scheduler.variance_type': 'learned'}, "got 'learned'"),
        ({'noise_scheduler.prediction_type': 'v_prediction'}, "got 'v_prediction'"),
        ({'noise_scheduler._target_': 'x.EulerScheduler'}, 'got EulerScheduler'),
        ({'noise_scheduler.thresholding': True}, 'thresholding: expected False, got True'),
        ({'num_inference_steps': 21}, 'steps: expected at most train_steps = 20, got 21'),
    ],
)
def test_what_has_no_counterpart_is_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], reason: str
) -> None:
    policy = lowdim_policy(Sizes())
    for path, value in change.items():
        section, _, key = path.rpartition('.')
        (policy[section] if section else policy)[key] = value
    save_lowdim(tmp_path / 'a.ckpt', Sizes(), policy)
    assert main([str(tmp_path / 'a.ckpt'), str(tmp_path / 'out')]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    assert re.search(reason, error), error
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('sizes', 'pruner', 'reason'),
    [
        (Sizes(), PublishedPruner(64), 'memory of width 32, got 64'),
        (Sizes(), PublishedPruner(32, classes=3), 'expected 4 classes, got 3'),
        (
            Sizes(cond_layers=1),
            PublishedPruner(32),
            'n_cond_layers: expected 0 of a policy with a pruner, got 1',
        ),
    ],
)
def test_a_pruner_of_another_policy_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    sizes: Sizes,
    pruner: PublishedPruner,
    reason: str,
) -> None:
    save_lowdim(tmp_path / 'a.ckpt', sizes)
    file = pruner.save(tmp_path / 'pruner.pt')
    command = [str(tmp_path / 'a.ckpt'), str(tmp_path / 'out'), '--pruner', str(file)]
    assert main(command) == 2
    assert reason in capsys.readouterr().err


def test_a_malicious_checkpoint_ends_the_command_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / 'executed'),)

    torch.save({'cfg': Attack(), 'state_dicts': {}}, tmp_path / 'a.ckpt')
    assert main([str(tmp_path / 'a.ckpt'), str(tmp_path / 'out')]) == 2
    assert 'got posix.mkdir' in capsys.readouterr().err
    assert not (tmp_path / 'executed').exists() and not (tmp_path / 'out').exists()


def test_an_existing_bundle_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_lowdim(tmp_path / 'a.ckpt', Sizes())
    out = _convert(tmp_path)
    before = (out / 'policy.safetensors').read_bytes()
    assert main([str(tmp_path / 'a.ckpt'), str(out)]) == 2
    assert 'expected a folder without a bundle' in capsys.readouterr().err
    assert (out / 'policy.safetensors').read_bytes() == before


def test_a_folder_that_holds_no_policy_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), str(tmp_path / 'out')]) == 2
    assert 'got a folder' in capsys.readouterr().err
