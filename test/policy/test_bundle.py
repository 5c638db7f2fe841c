# SPDX-License-Identifier: Apache-2.0
"""Bundles: what is written is read back, and nothing else is believed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tts_policy.policy.bundle import (
    MODEL_FILE,
    WEIGHTS_FILE,
    BundleError,
    load_bundle,
    save_bundle,
    save_pruner,
)
from tts_policy.policy.contract import ActionSpec, CameraSpec, ObservationSpec, PolicyContract
from tts_policy.policy.denoisers.transformer import TransformerOptions
from tts_policy.policy.encoders.resnet import ResNetSpec
from tts_policy.policy.network import NetworkSpec, PolicyNetwork
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.policy.schedulers.scheduler import SchedulerSpec


def _edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = bundle / MODEL_FILE
    data = yaml.safe_load(path.read_text())
    change(data)
    path.write_text(yaml.safe_dump(data))


def _put(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


def test_saving_what_was_loaded_gives_the_same_bundle(bundle: Path, tmp_path: Path) -> None:
    loaded = load_bundle(bundle)
    copy = tmp_path / 'copy'
    samplers = {name: spec for name, (spec, _) in loaded.samplers.items()}
    pruners = {name: pruner for name, (_, pruner) in loaded.samplers.items() if pruner}
    save_bundle(copy, loaded.name, loaded.network, samplers, pruners)
    for file in sorted(p.name for p in bundle.iterdir()):
        assert (copy / file).read_bytes() == (bundle / file).read_bytes(), file


@pytest.mark.parametrize('name', ['panda_can', 'panda_stack'])
def test_a_published_bundle_is_saved_with_the_text_it_has(name: str, tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / 'models' / name
    loaded = load_bundle(folder)
    samplers = {key: spec for key, (spec, _) in loaded.samplers.items()}
    pruners = {key: pruner for key, (_, pruner) in loaded.samplers.items() if pruner}
    save_bundle(tmp_path, loaded.name, loaded.network, samplers, pruners)
    assert (tmp_path / MODEL_FILE).read_text() == (folder / MODEL_FILE).read_text()


def test_a_sampler_without_a_pruner_runs_dense_only(bundle: Path) -> None:
    from tts_policy.policy.policy import TestTimeSparsePolicy

    _edit(bundle, lambda data: data['samplers']['ddim5'].pop('pruner'))
    policy = TestTimeSparsePolicy.from_bundle(bundle, 'ddim5')
    assert policy.max_sparsity == policy.recommended_sparsity == 0.0
    with pytest.raises(ValueError, match='no pruner'):
        policy.check_sparsity(0.5)


def test_a_pruner_can_be_replaced(bundle: Path) -> None:
    pruner = load_bundle(bundle).sampler('ddim5')[1]
    assert pruner is not None
    with torch.no_grad():
        pruner.tables.fill_(0.5)
    save_pruner(bundle, 'ddim5', pruner)
    again = load_bundle(bundle).sampler('ddim5')[1]
    assert again is not None and (again.tables == 0.5).all()


def test_options_of_imported_policies_survive_the_bundle(tmp_path: Path) -> None:
    contract = PolicyContract(
        ObservationSpec((CameraSpec('view', 40, 36),), ('a', 'b'), steps=2, period_s=0.1),
        ActionSpec(('a', 'b'), 6, 6, 0, starts_at_newest=True),
    )
    resnet = ResNetSpec(norm='batch', crop=(32, 33), keypoints=8, features=16)
    network = NetworkSpec(
        width=16,
        layers=1,
        heads=2,
        denoiser=TransformerOptions(causal=False, cond_layers=1),
        encoder=resnet,
        train_steps=20,
    )
    scheduler = SchedulerSpec('ddpm', 10, 20, 'linear', prediction='sample', clip=0.0)
    made = PolicyNetwork(contract, network).eval()
    save_bundle(tmp_path, 'imported', made, {'ddpm10': SamplerSpec(scheduler)}, half=False)
    loaded = load_bundle(tmp_path)
    assert loaded.network.contract == contract and loaded.network.spec == network
    assert loaded.sampler('ddpm10')[0].scheduler == scheduler
    for name, value in made.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], value), name
    assert contract.usable_actions == 6


def test_a_policy_without_cameras_is_a_policy() -> None:
    contract = PolicyContract(
        ObservationSpec((), ('a',), steps=1, period_s=0.1), ActionSpec(('a',), 4, 4, 0)
    )
    assert PolicyContract.from_dict(contract.to_dict()) == contract


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        (_put('format', value=2), 'format: expected 1, got 2'),
        (_put('weights', 'file', value='../policy.safetensors'), 'expected a file in the bundle'),
        (_put('weights', 'file', value='/etc/passwd'), 'expected a file in the bundle'),
        (
            _put('weights', 'file', value='absent.safetensors'),
            r'absent\.safetensors: expected a weight file, got nothing',
        ),
        (_put('weights', 'sha256', value='0' * 64), 'expected sha256 0000'),
        (_put('weights', value='policy'), "weights: expected a mapping, got 'policy'"),
        (_put('network', 'width', value=64), 'size mismatch'),
        (_put('network', 'width', value='wide'), 'model.yaml'),
        (_put('network', 'depth', value=3), 'depth'),
        (
            _put('observation', 'joints', value=['a', 'a', 'b']),
            r'observation\.joints: expected names that differ',
        ),
        (
            _put('observation', 'period_s', value=0),
            r'observation\.period_s: expected at least 0\.001, got 0',
        ),
        (_put('action', 'execute', value=8), r'action\.execute: expected at most .* 7, got 8'),
        (_put('samplers', value={}), 'samplers: expected one or more, got'),
        (_put('samplers', 'ddim5', 'scheduler', 'kind', value='x'), "got 'x'"),
        (_put('samplers', 'ddim5', 'recommended_sparsity', value=0.9), 'recommended_sparsity'),
        (
            _put('samplers', 'ddim5', 'pruner', 'spec', 'steps', value=4),
            r'samplers\.ddim5: pruner\.steps: expected 5, got 4',
        ),
        (_put('samplers', 'ddim5', 'pruner', 'kind', value='oracle'), "got 'oracle'"),
        (_put('samplers', 'ddim5', 'scheduler', 'beta_schedule', value='x'), "got 'x'"),
        (_put('network', 'resnet', value={'norm': 'layer'}), "got 'layer'"),
        (
            _put('network', 'cond_layers', value=-1),
            r'network\.cond_layers: expected at least 0, got -1',
        ),
        (
            _put('action', 'starts_at_newest', value='no'),
            "starts_at_newest: expected true or false, got 'no'",
        ),
    ],
)
def test_a_bundle_that_contradicts_itself_is_refused(
    bundle: Path, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    _edit(bundle, change)
    with pytest.raises(BundleError, match=reason) as caught:
        load_bundle(bundle)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        (
            _put('network', 'camera_channels', value=-16),
            r'network\.camera_channels: expected at least 16, got -16',
        ),
        (
            _put('network', 'camera_channels', value=10**9),
            'camera_channels: expected at most 4096, got 1000000000',
        ),
        (
            _put('network', 'camera_channels', value=24),
            'camera_channels: expected a multiple of 16, got 24',
        ),
        (
            _put('network', 'camera_channels', value=16.0),
            'camera_channels: expected an integer, got 16.0',
        ),
        (
            _put('network', 'camera_blocks', value=True),
            'camera_blocks: expected an integer, got True',
        ),
        (
            _put('network', 'train_steps', value=0),
            r'network\.train_steps: expected at least 1, got 0',
        ),
        (
            _put('network', 'causal', value='no'),
            r"network\.causal: expected true or false, got 'no'",
        ),
        (_put('network', 'heads', value=True), r'network\.heads: expected an integer, got True'),
        (_put('network', 'objective', value=['flow']), r'network\.objective: expected a text'),
        (
            _put('network', 'resnet', value={'crop': [16.0, 16.0]}),
            r'network\.resnet\.crop\[0\]: expected an integer, got 16.0',
        ),
        (
            _put('network', 'resnet', value={'keypoints': True}),
            r'network\.resnet\.keypoints: expected an integer, got True',
        ),
        (
            _put('network', 'vit', value={'layers': True}),
            r'network\.vit\.layers: expected an integer, got True',
        ),
        (
            _put('network', 'dit', value={'rotary': 'no'}),
            r"network\.dit\.rotary: expected true or false, got 'no'",
        ),
        (
            _put('observation', 'period_s', value=True),
            r'observation\.period_s: expected a number, got True',
        ),
        (
            _put('action', 'offset_steps', value=True),
            r'action\.offset_steps: expected an integer, got True',
        ),
        (
            _put('observation', 'cameras', value=[{'key': 'a', 'height': 32.0, 'width': 48}]),
            r'observation\.cameras\[0\]\.height: expected an integer, got 32.0',
        ),
    ],
)
def test_a_network_of_impossible_fields_is_refused(
    bundle: Path, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    test_a_bundle_that_contradicts_itself_is_refused(bundle, change, reason)


@pytest.mark.parametrize(
    ('field', 'value', 'reason'),
    [
        ('force_first_step', 'no', "expected true or false, got 'no'"),
        ('hold_noise', 'no', "expected true or false, got 'no'"),
        ('hold_noise', 1, 'expected true or false, got 1'),
        ('max_rollout_age', 2.5, 'expected an integer, got 2.5'),
        ('max_rollout_age', True, 'expected an integer, got True'),
        ('temperature', False, 'expected a number, got False'),
        ('temperature', '0.5', "expected a number, got '0.5'"),
        ('recommended_sparsity', None, 'expected a number, got None'),
        ('scheduler.steps', 5.0, 'expected an integer, got 5.0'),
        ('scheduler.steps', True, 'expected an integer, got True'),
        ('scheduler.train_steps', 20.0, 'expected an integer, got 20.0'),
        ('scheduler.steps_offset', 0.5, 'expected an integer, got 0.5'),
        ('scheduler.set_alpha_to_one', 'no', "expected true or false, got 'no'"),
        ('scheduler.clip', True, 'expected a number, got True'),
        ('scheduler.clip', float('nan'), 'expected a finite number, got nan'),
        # YAML takes a number with an exponent but no point for a text.
        ('scheduler.beta_start', '1e-4', "expected a number, got '1e-4'"),
        ('scheduler.kind', ['ddim'], 'expected a text'),
    ],
)
def test_a_sampler_of_impossible_fields_is_refused(
    bundle: Path, field: str, value: object, reason: str
) -> None:
    change = _put('samplers', 'ddim5', *field.split('.'), value=value)
    expected = f'{field.rpartition(".")[2]}: {reason}'
    test_a_bundle_that_contradicts_itself_is_refused(bundle, change, expected)


def test_a_width_without_two_wavelengths_of_time_is_refused(bundle: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data['network'].update(width=2, heads=1)

    reason = r'denoiser\.width: expected at least 4, got 2'
    test_a_bundle_that_contradicts_itself_is_refused(bundle, change, reason)


@pytest.mark.parametrize(
    ('text', 'reason'),
    [
        ('[' * 100_000, 'not YAML: .*at most 50 levels'),
        ('format: 1\n2: 3\n', r"expected name, .*action, .* got \['format', 2\]"),
        ('format: 2026-99-99\n', 'not YAML: month must be in'),
    ],
    ids=['deep', 'mixed keys', 'no date'],
)
def test_a_model_file_that_cannot_be_parsed_is_refused(
    bundle: Path, text: str, reason: str
) -> None:
    (bundle / MODEL_FILE).write_text(text)
    with pytest.raises(BundleError, match=reason) as caught:
        load_bundle(bundle)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'error', [MemoryError(), RuntimeError("can't\nallocate"), RecursionError('too deep')], ids=repr
)
def test_what_ends_the_making_of_a_network_refuses_the_bundle(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(PolicyNetwork, '__init__', fail)
    with pytest.raises(BundleError, match=r"model\.yaml: (MemoryError|can't allocate|too deep)$"):
        load_bundle(bundle)


def test_missing_bundle_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(
        BundleError, match=r'absent/model\.yaml: expected a bundle file, got nothing'
    ):
        load_bundle(tmp_path / 'absent')


def test_a_weight_file_that_links_out_of_the_bundle_is_refused(
    bundle: Path, tmp_path: Path
) -> None:
    outside = tmp_path / 'outside.safetensors'
    (bundle / WEIGHTS_FILE).rename(outside)
    (bundle / WEIGHTS_FILE).symlink_to(outside)
    with pytest.raises(BundleError, match='expected a file in the bundle'):
        load_bundle(bundle)


def test_model_file_cannot_construct_objects(bundle: Path, tmp_path: Path) -> None:
    marker = tmp_path / 'executed'
    path = bundle / MODEL_FILE
    path.write_text(f'!!python/object/apply:os.mkdir ["{marker}"]\n')
    with pytest.raises(BundleError, match='not YAML'):
        load_bundle(bundle)
    assert not marker.exists()


def test_weights_that_are_not_finite_are_refused(bundle: Path) -> None:
    import hashlib

    state = load_file(bundle / WEIGHTS_FILE)
    state['denoiser.head.bias'][0] = float('nan')
    save_file(state, bundle / WEIGHTS_FILE)
    digest = hashlib.sha256((bundle / WEIGHTS_FILE).read_bytes()).hexdigest()
    _edit(bundle, _put('weights', 'sha256', value=digest))
    with pytest.raises(BundleError, match=r'expected finite weights.*denoiser\.head\.bias'):
        load_bundle(bundle)


def test_truncated_weights_are_refused(bundle: Path) -> None:
    path = bundle / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(BundleError, match='sha256'):
        load_bundle(bundle)
