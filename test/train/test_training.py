# SPDX-License-Identifier: Apache-2.0
"""Training of a policy end to end on small recordings: bags to bundle, resumed and refused."""

from __future__ import annotations

import csv
import shlex
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from small_training import SMALL
from torch import Tensor

from tts_policy.policy.bundle import load_bundle, save_random_bundle
from tts_policy.policy.encoders.camera_encoder import ENCODERS, CameraEncoderSpec
from tts_policy.policy.encoders.cnn import CnnSpec
from tts_policy.policy.encoders.resnet import ResNetSpec
from tts_policy.policy.encoders.vit import ViTSpec
from tts_policy.policy.network import NetworkSpec
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.policy.schedulers.scheduler import SchedulerSpec
from tts_policy.sim.panda import PANDA_CONTRACT
from tts_policy.train import train_policy, train_pruner
from tts_policy.train.training_run import StopRequest


def _weights(bundle: Path) -> dict[str, Tensor]:
    return load_bundle(bundle).network.state_dict()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as a terminal finds it; of a process in the background it may be ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures('interruptible')
@pytest.mark.parametrize(('signals', 'kept'), [(1, 5), (2, 4)])
@pytest.mark.parametrize('where', ['losses', 'update'])
def test_a_training_interrupted_within_a_step_ends_where_an_uninterrupted_one_does(
    where: str,
    signals: int,
    kept: int,
    bags: Path,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps = ['--steps', '6', '--encoder-steps', '2', '--save-every', '0']
    command = [str(bags), '--out', str(tmp_path), *steps, *SMALL]
    losses, clip = train_policy.PolicyTrainer.losses, torch.nn.utils.clip_grad_norm_
    step = -1

    def interrupt() -> None:
        for _ in range(signals if step == 4 else 0):
            signal.raise_signal(signal.SIGINT)

    def interrupted(trainer: train_policy.PolicyTrainer) -> tuple[Tensor, Tensor]:
        nonlocal step
        step, made = trainer.step, losses(trainer)
        if where == 'losses':
            interrupt()
        return made

    def interrupted_update(*args: object) -> Tensor:
        made = clip(*args)
        if where == 'update':
            interrupt()
        return made

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(train_policy.PolicyTrainer, 'losses', interrupted)
        patch.setattr(torch.nn.utils, 'clip_grad_norm_', interrupted_update)
        assert train_policy.main(command) == 130
    assert 'interrupted ' in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.load(tmp_path / 'checkpoint.pt', weights_only=True)['step'] == kept
    assert train_policy.main(command) == 0
    resumed, whole = _weights(tmp_path / 'bundle'), _weights(bundle)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    # A bundle holds half precision.
    ends = [
        torch.load(folder / 'checkpoint.pt', weights_only=True)
        for folder in (tmp_path, bundle.parent)
    ]
    for part in ('network', 'average', 'regressor'):
        resumed, whole = (end[part] for end in ends)
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert torch.equal(*(end['generator'] for end in ends))


def test_an_interrupt_that_is_ignored_stays_so() -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGINT)
        assert not stop.made and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize(
    ('option', 'value', 'reason'),
    [
        (
            '--objective',
            'flow',
            'network objective: expected diffusion, with which this run began, got flow',
        ),
        ('--seed', '1', 'training seed: expected 0, with which this run began, got 1'),
        (
            '--learning-rate',
            '1',
            'training learning_rate: expected 0.0003, with which this run began, got 1.0',
        ),
        ('--width', '40', 'network width: expected 32, with which this run began, got 40'),
    ],
)
def test_a_training_of_other_settings_is_not_continued(
    option: str,
    value: str,
    reason: str,
    bags: Path,
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = Path(shutil.copytree(bundle.parent, tmp_path / 'out'))
    command = [str(bags), '--out', str(out), '--steps', '6', '--encoder-steps', '2', *SMALL]
    before = (out / 'bundle' / 'model.yaml').read_bytes()
    assert train_policy.main([*command, option, value]) == 2
    expected = f'train_policy: {out}: {reason}; another --out begins a new run'
    assert capsys.readouterr().err.splitlines()[-1] == expected
    assert (out / 'bundle' / 'model.yaml').read_bytes() == before


def test_a_checkpoint_of_an_earlier_version_is_not_continued(
    bags: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(bundle.parent, tmp_path / 'out'))
    state = torch.load(out / 'checkpoint.pt', weights_only=True)
    del state['settings']
    torch.save(state, out / 'checkpoint.pt')
    command = [str(bags), '--out', str(out), '--steps', '6', '--encoder-steps', '2', *SMALL]
    assert train_policy.main(command) == 2
    assert 'expected an unknown value, with which this run began' in capsys.readouterr().err


def test_a_training_goes_on_for_longer_than_it_was_meant_to(
    bags: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(bundle.parent, tmp_path / 'out'))
    command = [str(bags), '--out', str(out), '--steps', '7', '--encoder-steps', '2', *SMALL]
    capsys.readouterr()
    assert train_policy.main(command) == 0
    said = capsys.readouterr().out
    assert 'steps left: 1; expected time: less than a minute (threads: 1)' in said
    words = shlex.split(said.splitlines()[-1].split('next: train_pruner ')[1])
    assert train_pruner.parse_arguments(words).bundle == out / 'bundle'
    assert torch.load(out / 'checkpoint.pt', weights_only=True)['step'] == 7
    # The means of the log begin anew with the losses of the one step.
    rows = list(csv.DictReader((out / 'log.csv').open()))
    assert [row['step'] for row in rows] == ['6', '7']
    assert float(rows[1]['regression']) > 0.25 * float(rows[0]['regression'])


def test_a_training_starts_from_the_weights_of_another_bundle(
    bags: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A learning rate of zero shows the weights it began with.
    still = ['--steps', '2', '--encoder-steps', '1', '--learning-rate', '0', '--held-out', '1']
    command = [str(bags), '--out', str(tmp_path / 'out'), '--initial', str(bundle), *still]
    command += ['--bfloat16', '--temperature', '0.25']
    assert train_policy.main(command) == 0
    samplers = load_bundle(tmp_path / 'out' / 'bundle').samplers.values()
    assert [spec.temperature for spec, _ in samplers] == [0.25, 0.25]
    begun, given = _weights(tmp_path / 'out' / 'bundle'), _weights(bundle)
    assert all(torch.equal(begun[name], given[name]) for name in given)

    model = yaml.safe_load((bundle / 'model.yaml').read_text())
    contract = {key: model[key] for key in ('observation', 'action')}
    contract['action']['execute'] -= 1
    (tmp_path / 'contract.yaml').write_text(yaml.safe_dump(contract))
    assert train_policy.main([*command, '--contract', str(tmp_path / 'contract.yaml')]) == 2
    assert 'observation and action: expected those to be trained' in capsys.readouterr().err


def test_residual_blocks_that_are_added_to_a_camera_encoder_change_nothing_at_first(
    bags: Path, bundle: Path, tmp_path: Path
) -> None:
    still = ['--steps', '2', '--encoder-steps', '1', '--learning-rate', '0', '--held-out', '1']
    command = [str(bags), '--out', str(tmp_path), '--initial', str(bundle), *still]
    assert train_policy.main([*command, '--camera-blocks', '2', '--threads', '1']) == 0
    larger, given = (load_bundle(path).network.eval() for path in (tmp_path / 'bundle', bundle))
    assert larger.spec.encoder == CnnSpec(blocks=2)
    assert len(larger.state_dict()) > len(given.state_dict())
    image = torch.randint(256, (1, 2, 96, 96, 3), dtype=torch.uint8)
    joints = torch.zeros(1, 2, len(given.contract.observation.joints))
    with torch.no_grad():
        features = [network.features({'camera': image}, joints) for network in (larger, given)]
    torch.testing.assert_close(*features, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ('encoder', 'made'),
    [
        (['cnn', 'channels=16'], CnnSpec(16)),
        (['resnet', 'keypoints=8', 'crop=[80, 84]'], ResNetSpec(keypoints=8, crop=(80, 84))),
        (['vit', 'width=64', 'layers=1', 'hidden=64'], ViTSpec(64, 1, 64)),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else '',
)
def test_every_camera_encoder_can_be_trained_and_its_bundle_loaded(
    encoder: list[str], made: CameraEncoderSpec, bags: Path, tmp_path: Path
) -> None:
    steps = ['--steps', '2', '--encoder-steps', '1', '--encoder', *encoder]
    assert train_policy.main([str(bags), '--out', str(tmp_path), *SMALL, *steps]) == 0
    assert load_bundle(tmp_path / 'bundle').network.spec.encoder == made


@pytest.mark.parametrize(
    ('words', 'reason'),
    [
        (['--encoder', 'lstm'], f'--encoder: expected one of {", ".join(ENCODERS)}, got lstm'),
        (['--encoder', 'resnet', 'depth=50'], 'resnet.depth: expected no field of this name'),
        (['--denoiser', 'dit', 'rotary=1'], 'dit.rotary: expected true or false, got 1'),
    ],
)
def test_unknown_kinds_and_settings_are_refused_in_one_line(
    words: list[str],
    reason: str,
    bags: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train_policy.main([str(bags), '--out', str(tmp_path), *SMALL, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f'train_policy: {reason}') and error.count('\n') == 1


def test_another_objective_than_that_of_the_initial_bundle_is_refused(
    bags: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(bags), '--out', str(tmp_path), '--initial', str(bundle), '--objective', 'flow']
    assert train_policy.main(command) == 2
    expected = '--objective: expected diffusion, that of --initial, got flow'
    assert capsys.readouterr().err == f'train_policy: {expected}\n'


def test_samplers_have_the_training_schedule_of_the_initial_bundle(
    bags: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ['--steps', '1', '--encoder-steps', '0', '--batch', '2', '--held-out', '1']
    for train_steps in (200, 50):
        initial, out = tmp_path / f'initial_{train_steps}', tmp_path / f'out_{train_steps}'
        network = NetworkSpec(width=32, layers=2, train_steps=train_steps)
        samplers = {'ddim10': SamplerSpec(SchedulerSpec('ddim', 10, train_steps))}
        save_random_bundle(initial, PANDA_CONTRACT, samplers, network)
        command = [str(bags), '--out', str(out), '--initial', str(initial), *steps]
        assert train_policy.main(command) == (0 if train_steps == 200 else 2)
    samplers = load_bundle(tmp_path / 'out_200' / 'bundle').samplers
    assert [spec.scheduler.train_steps for spec, _ in samplers.values()] == [200, 200]
    assert 'scheduler.steps: expected at most train_steps = 50, got 100' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('option', 'value', 'reason'),
    [
        ('--threads', '0', 'threads: expected at least 1, got 0'),
        ('--camera-blocks', '9', 'cnn.blocks: expected at most 5, got 9'),
        ('--temperature', '2', 'sampler.temperature: expected at most 1.0, got 2.0'),
    ],
)
def test_sizes_that_cannot_be_are_refused_in_one_line(
    option: str, value: str, reason: str, bags: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = [str(bags), '--out', str(tmp_path / 'out'), '--threads', '1', option, value]
    assert train_policy.main(command) == 2
    assert capsys.readouterr().err == f'train_policy: {reason}\n'


def test_a_width_that_cannot_be_is_refused_in_one_line(
    bags: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        train_policy.main([str(bags), '--out', str(tmp_path / 'out'), *SMALL, '--width', '33'])
        == 2
    )
    reason = 'denoiser.width: expected a multiple of 2 x heads = 8, got 33'
    assert capsys.readouterr().err.splitlines()[-1] == f'train_policy: {reason}'
