# SPDX-License-Identifier: Apache-2.0
"""LeRobot's multi-task DiT policies become bundles that compute the same, or are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lerobot_layout import TEXT, LeRobotPolicy, LeRobotSizes

from tts_policy.convert.convert_checkpoint import main
from tts_policy.policy.bundle import load_bundle
from tts_policy.policy.policy import TestTimeSparsePolicy

TOLD = ['--instruction-tokens', *map(str, TEXT)]


def converted(policy: LeRobotPolicy, tmp_path: Path, **changes: Any) -> Path:
    folder = policy.save(tmp_path / 'policy', **changes)
    assert main([str(folder), str(tmp_path / 'bundle'), *TOLD]) == 0
    return tmp_path / 'bundle'


@pytest.mark.parametrize(
    ('sizes', 'changes', 'timesteps'),
    [
        (LeRobotSizes(), {}, [0.0, 41.0, 99.0]),
        (LeRobotSizes(layers=1, position=False, mode='MEAN_STD'), {}, [0.0, 41.0, 99.0]),
        (LeRobotSizes(obs_steps=1), {'objective': 'flow_matching'}, [0.0, 0.3, 0.97]),
        (LeRobotSizes(cameras=('top',)), {}, [0.0, 41.0, 99.0]),
        (LeRobotSizes(cameras=('top', 'wrist'), mode='MEAN_STD'), {}, [0.0, 41.0, 99.0]),
        (LeRobotSizes(cameras=('top', 'wrist'), separate=True), {}, [0.0, 41.0, 99.0]),
    ],
)
def test_a_policy_computes_what_its_layers_compute(
    sizes: LeRobotSizes, changes: dict[str, Any], timesteps: list[float], tmp_path: Path
) -> None:
    policy = LeRobotPolicy(sizes).eval()
    network = load_bundle(converted(policy, tmp_path, **changes)).network.eval()
    states, images = torch.randn(3, sizes.obs_steps, sizes.state_dim), policy.random_images(3)
    noisy, t = torch.randn(3, sizes.horizon, sizes.action_dim), torch.tensor(timesteps)
    # What a tokenizer puts behind the end of a text has no effect.
    text = policy.text([*TEXT, *[TEXT[-1]] * 9])
    with torch.no_grad():
        seen = policy.observe(states, images)
        expected = policy(noisy, t, seen, text)
        features = network.features(images, states)
        got = network.denoiser(noisy, t, features)
        actions = network.action_normalizer.normalize(noisy)
    torch.testing.assert_close(features, seen, rtol=0, atol=1e-5)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(actions, policy.normalize('action', noisy), rtol=0, atol=1e-5)
    assert expected.std() > 0.1


def test_the_instruction_matters(tmp_path: Path) -> None:
    folder = LeRobotPolicy(LeRobotSizes()).save(tmp_path / 'policy')
    weights = []
    for word in (320, 2368):
        out = tmp_path / f'bundle{word}'
        tokens = map(str, (TEXT[0], word, TEXT[-1]))
        assert main([str(folder), str(out), '--instruction-tokens', *tokens]) == 0
        weights.append(load_bundle(out).network.state_dict()['denoiser.blocks.0.modulation.bias'])
    assert (weights[0] - weights[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ('changes', 'samplers'),
    [
        ({}, ['ddpm100', 'ddim10']),
        ({'noise_scheduler_type': 'DDIM', 'num_inference_steps': 16}, ['ddim16']),
        ({'objective': 'flow_matching', 'num_integration_steps': 30}, ['flow30', 'flow10']),
        ({'objective': 'flow_matching', 'num_integration_steps': 8}, ['flow8']),
    ],
)
def test_a_bundle_runs_sparse_with_the_samplers_of_its_policy(
    changes: dict[str, Any], samplers: list[str], tmp_path: Path
) -> None:
    original = LeRobotPolicy(LeRobotSizes(cameras=('top',)))
    bundle = converted(original, tmp_path, **changes)
    assert list(load_bundle(bundle).samplers) == samplers
    policy = TestTimeSparsePolicy.from_bundle(bundle)
    images = {key: value[0].numpy() for key, value in original.random_images(1).items()}
    window = {'joints': np.zeros((2, 5)), **images}
    policy.act(window, 0.5)
    chunk = policy.act(window, 0.5)
    assert chunk.stats.sparsity == pytest.approx(0.5)
    assert chunk.actions.shape == (7, 3) and np.isfinite(chunk.actions).all()


def test_the_draft_of_parameters_has_the_range_of_actions(tmp_path: Path) -> None:
    policy = LeRobotPolicy(LeRobotSizes())
    text = (converted(policy, tmp_path) / 'parameters.yaml').read_text()
    limits = yaml.safe_load(text)['/**/tts_policy']['ros__parameters']['limits']
    assert limits['lower'] == pytest.approx(policy.low['action'].tolist(), abs=1e-3)
    high = policy.low['action'] + policy.spread['action']
    assert limits['upper'] == pytest.approx(high.tolist(), abs=1e-3)


def test_an_action_that_never_moved_stays_where_it_was(tmp_path: Path) -> None:
    policy = LeRobotPolicy(LeRobotSizes())
    policy.spread['action'][1] = 0.0
    normalizer = load_bundle(converted(policy, tmp_path)).network.action_normalizer
    actions = normalizer.unnormalize(torch.tensor([[-1.0] * 3, [1.0] * 3]))
    assert actions[:, 1].tolist() == pytest.approx([float(policy.low['action'][1])] * 2)


def inputs(kind: str, *shape: int) -> dict[str, Any]:
    return {
        'input_features': {
            'observation.state': {'type': 'STATE', 'shape': [5]},
            'observation.images.top': {'type': kind, 'shape': list(shape)},
        }
    }


@pytest.mark.parametrize(
    ('changes', 'reason'),
    [
        (
            inputs('VISUAL', 1, 40, 48),
            'observation.images.top: expected 3 channels, height and width',
        ),
        (inputs('ENV', 3), "observation.images.top: expected type STATE or VISUAL, got 'ENV'"),
        (
            inputs('VISUAL', 3, 40, 48),
            'vision_encoder.model.embeddings.patch_embedding.weight: exp',
        ),
        (
            {'input_features': {}},
            'observation.state: expected the length of a vector, got nothing',
        ),
        ({'type': 'diffusion'}, "got 'diffusion': convolutional U-Nets are not supported yet"),
        ({'type': 'act'}, "expected multi_task_dit, got 'act'"),
        ({'objective': 'guessing'}, 'config.objective: expected'),
        ({'sigma_min': 0.1, 'objective': 'flow_matching'}, 'sigma_min: expected 0, got 0.1'),
        (
            {'text_encoder_name': 'laion/CLIP-ViT'},
            'text_encoder_name: expected a name beginning with openai',
        ),
        ({'hidden_dim': 32}, 'weight: expected shape (192, 74), got (96, 74)'),
        (
            {'num_layers': 3},
            'noise_predictor.transformer_blocks.2.multihead_attn.in_proj_weight: expected',
        ),
        ({'num_layers': 1}, 'of an unknown architecture such as noise_predictor'),
        ({'num_layers': 1 << 40}, 'network.layers: expected at most 16384'),
        ({'use_rope': True}, 'qkv_proj.weight: expected a weight'),
        ({'n_action_steps': 8}, 'action.execute: expected at most'),
        ({'noise_scheduler_type': 'PNDM'}, 'expected DDPMScheduler or DDIMScheduler, got PNDM'),
        ({'horizon': 'long'}, "config.horizon: expected an integer, got 'long'"),
    ],
)
def test_what_has_no_counterpart_is_refused_in_one_line(
    changes: dict[str, Any], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = LeRobotPolicy(LeRobotSizes()).save(tmp_path / 'policy', **changes)
    assert main([str(folder), str(tmp_path / 'out'), *TOLD]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count('\n') == 1
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('changes', 'reason'),
    [
        ({'image_crop_shape': [12, 16]}, 'camera top: expected images of 16 x 16 after resize'),
        (
            {'image_crop_shape': [32, 32]},
            'expected images of 16 x 16 after resize and crop, got 20',
        ),
        ({'image_resize_shape': None, 'image_crop_shape': None}, 'got 40 x 48'),
        (
            {'image_resize_shape': [64]},
            'image_resize_shape: expected height and width, or nothing, got [64]',
        ),
        (
            {'vision_encoder_name': 'laion/CLIP-ViT'},
            'vision_encoder_name: expected a name beginning with openai',
        ),
        ({'use_separate_rgb_encoder_per_camera': True}, 'vision_encoders.0.model.embeddings'),
        (
            inputs('VISUAL', 3, 4000, 48),
            'images.top: camera.height: expected at most 2048, got 4000',
        ),
    ],
)
def test_cameras_that_their_encoder_cannot_see_are_refused_in_one_line(
    changes: dict[str, Any], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = LeRobotPolicy(LeRobotSizes(cameras=('top',)))
    folder = policy.save(tmp_path / 'policy', **changes)
    assert main([str(folder), str(tmp_path / 'out'), *TOLD]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count('\n') == 1
    assert not (tmp_path / 'out').exists()


def _step(folder: Path, **changes: Any) -> None:
    path = folder / 'policy_preprocessor.json'
    data = json.loads(path.read_text())
    data['steps'][1] |= changes
    path.write_text(json.dumps(data))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: _cut(f / 'model.safetensors'), 'model.safetensors: '),
    (lambda f: (f / 'model.safetensors').unlink(), 'weights of at most'),
    (lambda f: (f / 'model.safetensors').write_bytes(b'\xff' * 64), 'model.safetensors: '),
    (lambda f: (f / 'config.json').write_text('[' * 100_000), 'config.json: expected JSON'),
    (lambda f: (f / 'config.json').write_text('[1]'), 'config.json: expected a mapping'),
    (lambda f: (f / 'config.json').write_bytes(b' ' * (2 << 20)), 'at most 1048576 bytes'),
    (
        lambda f: (f / 'policy_preprocessor.json').unlink(),
        'policy_preprocessor.json: expected a file',
    ),
    (
        lambda f: _step(f, state_file='../../etc/passwd'),
        'state_file: expected a file in the folder',
    ),
    (lambda f: _step(f, registry_name='relative_actions_processor'), 'steps of known effect'),
    (lambda f: _step(f, config={'norm_map': {'STATE': 'MAGIC'}}), 'expected MEAN_STD or a range'),
    (lambda f: _step(f, config={'norm_map': {'STATE': 'QUANTILES'}}), 'observation.state.q01'),
    (
        lambda f: _cut(f / 'policy_preprocessor_step_1_normalizer_processor.safetensors'),
        'normalizer_processor.safetensors: ',
    ),
]


@pytest.mark.parametrize(('damage', 'reason'), DAMAGE)
def test_a_damaged_folder_is_refused_in_one_line(
    damage: Callable[[Path], object],
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = LeRobotPolicy(LeRobotSizes()).save(tmp_path / 'policy')
    damage(folder)
    assert main([str(folder), str(tmp_path / 'out'), *TOLD]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count('\n') == 1
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('tokens', 'reason'),
    [
        ([], '--instruction-tokens: expected'),
        (['320'], 'expected 49406 first'),
        (['49406', *['320'] * 80, '49407'], 'at most 77 tokens'),
        (['49406', '60000', '49407'], r'each in [0, 49408)'),
    ],
)
def test_an_instruction_that_is_none_is_refused(
    tokens: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = LeRobotPolicy(LeRobotSizes()).save(tmp_path / 'policy')
    option = ['--instruction-tokens', *tokens] if tokens else []
    assert main([str(folder), str(tmp_path / 'out'), *option]) == 2
    assert reason in capsys.readouterr().err
