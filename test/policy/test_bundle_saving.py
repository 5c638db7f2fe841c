# SPDX-License-Identifier: Apache-2.0
"""Saving bundles: whatever happens, what stands in the folder can be loaded."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_policy import CONTRACT, NETWORK, SAMPLERS

from tts_policy.policy.bundle import (
    MODEL_FILE,
    WEIGHTS_FILE,
    BundleError,
    load_bundle,
    save_bundle,
    save_pruner,
)
from tts_policy.policy.encoders.camera_encoder import CameraEncoderSpec
from tts_policy.policy.encoders.cnn import CnnSpec
from tts_policy.policy.encoders.resnet import ResNetSpec
from tts_policy.policy.encoders.vit import ViTSpec
from tts_policy.policy.network import NetworkSpec, PolicyNetwork
from tts_policy.policy.pruner import Pruner, PrunerSpec
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.policy.schedulers.scheduler import SchedulerSpec

STAGES = [('fsync', 1), ('replace', 1), ('fsync', 2), ('replace', 2), ('unlink', 1)]


class _Interrupted(BaseException):
    """Not an Exception, as a KeyboardInterrupt is not."""


def _interrupt(patch: pytest.MonkeyPatch, stage: str, count: int) -> None:
    """Raise in the count-th call of a function that writing makes."""
    owner: Any = Path if stage == 'unlink' else os
    original, calls = getattr(owner, stage), []

    def interrupted(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == count:
            raise _Interrupted
        original(*args, **kwargs)

    patch.setattr(owner, stage, interrupted)


def _filled(folder: Path, sampler: str, value: float) -> Pruner:
    """Pruner of a bundle's sampler with all its tables set to a value."""
    pruner = load_bundle(folder).sampler(sampler)[1]
    assert isinstance(pruner, Pruner)
    with torch.no_grad():
        pruner.tables.fill_(value)
    return pruner


def _table(folder: Path, sampler: str) -> float:
    pruner = load_bundle(folder).sampler(sampler)[1]
    assert isinstance(pruner, Pruner)
    return pruner.tables.flatten()[0].item()


def _network(seed: int = 0) -> PolicyNetwork:
    torch.manual_seed(seed)
    return PolicyNetwork(CONTRACT, NETWORK)


def _policy_of(bundle: Path) -> PolicyNetwork:
    """Network of a bundle whose pruners cannot be loaded."""
    network = PolicyNetwork(CONTRACT, NETWORK)
    network.load_state_dict(
        {name: value.float() for name, value in load_file(bundle / WEIGHTS_FILE).items()}
    )
    return network


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(('stage', 'count'), STAGES)
def test_an_interrupted_pruner_leaves_the_old_or_the_new_one(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, stage: str, count: int
) -> None:
    before = _files(bundle)
    old, pruner = _table(bundle, 'ddim5'), _filled(bundle, 'ddim5', 0.5)
    with monkeypatch.context() as patch:
        _interrupt(patch, stage, count)
        with pytest.raises(_Interrupted):
            save_pruner(bundle, 'ddim5', pruner)
    assert _table(bundle, 'ddim5') == (0.5 if stage == 'unlink' else old)
    save_pruner(bundle, 'ddim5', _filled(bundle, 'ddim5', 0.25))
    assert _table(bundle, 'ddim5') == 0.25
    assert len(_files(bundle)) == len(before), 'leftovers'


@pytest.mark.parametrize(('stage', 'count'), STAGES)
def test_an_interrupted_bundle_leaves_the_old_or_the_new_one(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, stage: str, count: int
) -> None:
    with monkeypatch.context() as patch:
        _interrupt(patch, stage, count)
        with pytest.raises(_Interrupted):
            save_bundle(bundle, 'new', _network(), SAMPLERS)
    assert load_bundle(bundle).name == ('new' if stage == 'unlink' else 'random')
    save_bundle(bundle, 'newer', _network(2), SAMPLERS)
    assert load_bundle(bundle).name == 'newer' and len(_files(bundle)) == 2


def test_a_full_disk_is_reported_and_costs_nothing(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, 'No space left on device')

    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    with monkeypatch.context() as patch, pytest.raises(OSError, match='No space left'):
        patch.setattr(os, 'fsync', full)
        save_pruner(bundle, 'ddim5', _filled(bundle, 'ddim5', 0.5))
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before


def test_what_a_killed_process_left_goes_with_the_next_save_and_nothing_else(bundle: Path) -> None:
    left = ['pruner_ddim5-0123456789ab.safetensors', 'policy-0123456789ab.safetensors.tmp']
    others = ['CARD.md', 'my.safetensors', 'pruner_mine.safetensors', 'pruner_ddim5.bak']
    for name in (*left, *others):
        (bundle / name).write_text('x')
    save_pruner(bundle, 'ddim5', _filled(bundle, 'ddim5', 0.5))
    assert not _files(bundle) & set(left) and set(others) <= _files(bundle)


def test_a_bundle_that_is_saved_while_it_is_read_is_read_whole(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruner, read, saved = _filled(bundle, 'ddim5', 0.5), Path.read_bytes, []

    def saving_first(path: Path) -> bytes:
        if not saved:
            saved.append(path)
            save_pruner(bundle, 'ddim5', pruner)
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, 'read_bytes', saving_first)
        assert _table(bundle, 'ddim5') == 0.5


def test_pruners_that_are_saved_at_the_same_time_are_all_kept(bundle: Path) -> None:
    values = (0.125, 0.25, 0.5)
    pruners = {name: [_filled(bundle, name, value) for value in values] for name in SAMPLERS}

    def save(name: str) -> None:
        for pruner in pruners[name]:
            save_pruner(bundle, name, pruner)

    threads = [threading.Thread(target=save, args=(name,)) for name in pruners]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        load_bundle(bundle)
    assert [_table(bundle, name) for name in SAMPLERS] == [values[-1]] * len(SAMPLERS)
    assert len(_files(bundle)) == 2 + len(SAMPLERS)


def test_a_policy_that_is_saved_again_keeps_its_pruners(bundle: Path) -> None:
    network, before = load_bundle(bundle).network, (bundle / MODEL_FILE).read_bytes()
    settings = {name: replace(spec, temperature=0.5) for name, spec in SAMPLERS.items()}
    assert save_bundle(bundle, 'random', network, settings) == ()
    assert all(pruner is not None for _, pruner in load_bundle(bundle).samplers.values())
    assert save_bundle(bundle, 'random', network, SAMPLERS) == ()
    assert (bundle / MODEL_FILE).read_bytes() == before


def test_another_policy_drops_the_pruners_and_their_files(bundle: Path) -> None:
    dropped = save_bundle(bundle, 'other', _network(), SAMPLERS)
    assert dropped == tuple(SAMPLERS)
    assert [pruner for _, pruner in load_bundle(bundle).samplers.values()] == [None, None]
    assert len(_files(bundle)) == 2


@pytest.mark.parametrize(
    ('samplers', 'kept'),
    [
        ({'ddim5': SAMPLERS['ddim5']}, ['ddim5']),
        ({**SAMPLERS, 'ddim5': SamplerSpec(SchedulerSpec('ddim', 4, 20))}, ['ddpm20']),
        ({**SAMPLERS, 'ddim5': SamplerSpec(SchedulerSpec('ddim', 5, 20, clip=2.0))}, ['ddpm20']),
    ],
)
def test_a_pruner_goes_with_its_sampler(
    bundle: Path, samplers: dict[str, SamplerSpec], kept: list[str]
) -> None:
    dropped = save_bundle(bundle, 'random', load_bundle(bundle).network, samplers)
    assert dropped == tuple(name for name in SAMPLERS if name not in kept)
    loaded = load_bundle(bundle).samplers
    assert [name for name, (_, pruner) in loaded.items() if pruner is not None] == kept
    assert len(_files(bundle)) == 2 + len(kept)


def test_a_pruner_that_is_damaged_or_of_another_layout_is_dropped(bundle: Path) -> None:
    (bundle / 'pruner_ddim5.safetensors').write_bytes(b'')
    network = _policy_of(bundle)
    assert save_bundle(bundle, 'random', network, SAMPLERS) == ('ddim5',)
    heads = PolicyNetwork(CONTRACT, replace(NETWORK, heads=4))
    heads.load_state_dict(network.state_dict())
    assert save_bundle(bundle, 'random', heads, SAMPLERS) == ('ddpm20',)
    assert load_bundle(bundle).network.spec.heads == 4


def test_a_file_of_names_given_before_is_loaded_and_replaced(bundle: Path) -> None:
    (bundle / 'pruner_ddim5.safetensors').rename(bundle / 'mine.safetensors')
    path = bundle / MODEL_FILE
    path.write_text(path.read_text().replace('pruner_ddim5.safe', 'mine.safe'))
    save_pruner(bundle, 'ddpm20', _filled(bundle, 'ddpm20', 0.5))
    assert _table(bundle, 'ddpm20') == 0.5 and load_bundle(bundle).sampler('ddim5')[1] is not None


def _not_finite(network: PolicyNetwork) -> None:
    next(network.denoiser.parameters()).data.flatten()[0] = 1e6  # infinite in half precision


@pytest.mark.parametrize(
    ('samplers', 'pruners', 'change', 'reason'),
    [
        (
            {'a': SamplerSpec(SchedulerSpec('ddim', 5, 100))},
            {},
            None,
            r'scheduler\.train_steps: expected 20, got 100',
        ),
        (
            {'a': SamplerSpec(SchedulerSpec('flow', 5, prediction='velocity'))},
            {},
            None,
            r'scheduler\.kind: expected ddim or ddpm or dpm_solver',
        ),
        ({}, {}, None, 'samplers: expected one or more, got'),
        (SAMPLERS, {'ddim5': 4}, None, r'samplers\.ddim5: pruner\.steps: expected 5, got 4'),
        (SAMPLERS, {'ddim9': 9}, None, "sampler: expected one of ddim5, ddpm20, got 'ddim9'"),
        ({'a/b': SAMPLERS['ddim5']}, {'a/b': 5}, None, 'expected a file in the bundle'),
        (SAMPLERS, {}, _not_finite, 'policy: expected finite weights'),
    ],
)
def test_what_would_not_be_loaded_is_not_saved(
    bundle: Path,
    samplers: dict[str, SamplerSpec],
    pruners: dict[str, int],
    change: Callable[[PolicyNetwork], None] | None,
    reason: str,
) -> None:
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    network = _network()
    if change is not None:
        change(network)
    made = {
        name: Pruner(PrunerSpec.of(network.denoiser.spec, steps, (0.5,)))
        for name, steps in pruners.items()
    }
    with pytest.raises(BundleError, match=reason) as caught:
        save_bundle(bundle, 'new', network, samplers, made)
    assert '\n' not in str(caught.value)
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before


def test_a_pruner_that_would_not_be_loaded_is_not_added(bundle: Path, tmp_path: Path) -> None:
    before = (bundle / MODEL_FILE).read_bytes()
    pruner = Pruner(PrunerSpec.of(_network().denoiser.spec, 4, (0.5,)))
    with pytest.raises(BundleError, match=r'samplers\.ddim5: pruner\.steps: expected 5, got 4'):
        save_pruner(bundle, 'ddim5', pruner)
    with pytest.raises(BundleError, match="got 'ddim4'"):
        save_pruner(bundle, 'ddim4', pruner)
    with pytest.raises(
        BundleError, match=r'absent/model\.yaml: expected a bundle file, got nothing'
    ):
        save_pruner(tmp_path / 'absent', 'ddim5', pruner)
    assert (bundle / MODEL_FILE).read_bytes() == before


@pytest.mark.parametrize(
    'encoder',
    [ResNetSpec(), ViTSpec(64, 1, 64), CnnSpec(blocks=1)],
    ids=['resnet', 'vit', 'blocks'],
)
def test_a_pruner_is_added_whatever_the_encoder(
    tmp_path: Path, encoder: CameraEncoderSpec
) -> None:
    spec = NetworkSpec(width=16, layers=1, heads=2, train_steps=20, encoder=encoder)
    network = PolicyNetwork(CONTRACT, spec)
    save_bundle(tmp_path, 'a', network, SAMPLERS)
    state = torch.get_rng_state()
    pruner = Pruner(PrunerSpec.of(network.denoiser.spec, 5, (0.5,)))
    torch.set_rng_state(state)
    save_pruner(tmp_path, 'ddim5', pruner)
    assert torch.equal(torch.get_rng_state(), state), 'random numbers were drawn'
    assert load_bundle(tmp_path).sampler('ddim5')[1] is not None
    assert 'pruner' in yaml.safe_load((tmp_path / MODEL_FILE).read_text())['samplers']['ddim5']
