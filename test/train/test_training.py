# SPDX-License-Identifier: Apache-2.0
"""Training end to end on small recordings: bags to bundle to pruner, resumed and repeated."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from bags import Recording
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tts_policy.core.bundle import load_bundle
from tts_policy.core.policy import TestTimeSparsePolicy
from tts_policy.core.pruner import Pruner
from tts_policy.train import train_policy, train_pruner
from tts_policy.train.pruner_trainer import PrunerTrainer
from tts_policy.train.replicas import Replicas

SMALL = ['--width', '32', '--layers', '2', '--batch', '4', '--threads', '1', '--held-out', '1']


@pytest.fixture(scope='module')
def bags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('bags')
    for n in range(3):
        Recording(frames=20).write(folder / f'episode_{n}')
    return folder


@pytest.fixture(scope='module')
def bundle(bags: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp('policy')
    steps = ['--steps', '6', '--encoder-steps', '2']
    assert train_policy.main([str(bags), '--out', str(out), *steps, *SMALL]) == 0
    return out / 'bundle'


def _weights(bundle: Path) -> dict[str, Tensor]:
    return load_bundle(bundle).network.state_dict()


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(
    bags: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = ['--steps', '6', '--encoder-steps', '2']
    command = [str(bags), '--out', str(tmp_path), *steps, *SMALL]
    train_step = train_policy.PolicyTrainer.train_step

    def interrupted(trainer: train_policy.PolicyTrainer) -> dict[str, float]:
        if trainer.step == 4:
            raise KeyboardInterrupt
        return train_step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(train_policy.PolicyTrainer, 'train_step', interrupted)
        assert train_policy.main(command) == 130
    assert train_policy.main(command) == 0
    resumed, whole = _weights(tmp_path / 'bundle'), _weights(bundle)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


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
    assert 'observation and action must be those to be trained' in capsys.readouterr().err


def test_residual_blocks_that_are_added_to_a_camera_encoder_change_nothing_at_first(
    bags: Path, bundle: Path, tmp_path: Path
) -> None:
    still = ['--steps', '2', '--encoder-steps', '1', '--learning-rate', '0', '--held-out', '1']
    command = [str(bags), '--out', str(tmp_path), '--initial', str(bundle), *still]
    assert train_policy.main([*command, '--camera-blocks', '2', '--threads', '1']) == 0
    larger, given = (load_bundle(path).network.eval() for path in (tmp_path / 'bundle', bundle))
    assert larger.spec.camera_blocks == 2
    assert len(larger.state_dict()) > len(given.state_dict())
    image = torch.randint(256, (1, 2, 96, 96, 3), dtype=torch.uint8)
    joints = torch.zeros(1, 2, len(given.contract.observation.joints))
    with torch.no_grad():
        features = [network.features({'camera': image}, joints) for network in (larger, given)]
    torch.testing.assert_close(*features, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ('option', 'value', 'reason'),
    [
        ('--threads', '0', 'threads must be at least 1, got 0'),
        ('--camera-blocks', '9', 'network camera_blocks must be in [0, 5], got 9'),
        ('--temperature', '2', 'temperature must be in [0, 1], got 2.0'),
    ],
)
def test_sizes_that_cannot_be_are_refused_in_one_line(
    option: str, value: str, reason: str, bags: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = [str(bags), '--out', str(tmp_path / 'out'), '--threads', '1', option, value]
    assert train_policy.main(command) == 2
    assert capsys.readouterr().err == f'train_policy: {reason}\n'


PRUNER_SIZES = ['--steps', '2', '--batch', '3', '--sample', '2', '--episodes', '4', '--ticks', '2']


def _pruner_command(bags: Path, bundle: Path, out: Path) -> list[str]:
    sampler = ['--sampler', 'ddim10', '--sparsities', '0.6', '0.8']
    return [
        str(bags),
        '--bundle',
        str(bundle),
        '--out',
        str(out),
        *sampler,
        *PRUNER_SIZES,
        '--held-out',
        '1',
    ]


def _pruner(bundle: Path) -> Pruner:
    pruner = load_bundle(bundle).sampler('ddim10')[1]
    assert pruner is not None
    return pruner


def test_a_pruner_for_every_sparsity_is_added_to_the_bundle_and_compared(
    bags: Path, bundle: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(bundle, tmp_path / 'bundle'))
    assert train_pruner.main(_pruner_command(bags, bundle, tmp_path)) == 0
    reports = json.loads((tmp_path / 'report.json').read_text())
    for report, sparsity in zip(reports, (0.6, 0.8), strict=True):
        arms = report['l1_error']
        assert set(arms) == {'learned', 'constant', 'other_tick', 'static', 'random'}
        assert all(arm['realised_sparsity'] == pytest.approx(sparsity) for arm in arms.values())
    assert _pruner(bundle).spec.sparsities == (0.6, 0.8)
    with (tmp_path / 'log.csv').open() as log:
        assert all(0 <= float(row['kept_back']) < 1 for row in csv.DictReader(log))
    assert TestTimeSparsePolicy.from_bundle(bundle, 'ddim10').max_sparsity == pytest.approx(0.9)
    assert TestTimeSparsePolicy.from_bundle(bundle, 'ddpm100').max_sparsity == 0.0


def test_a_table_is_added_beside_those_a_bundle_has(
    bags: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(bundle, tmp_path / 'bundle'))
    more = _pruner_command(bags, bundle, tmp_path / 'more')
    first = more.index('--sparsities') + 1
    more[first : first + 2] = ['0.7']
    assert train_pruner.main([*more, '--add']) == 2
    assert 'pruner with tables for 6 blocks expected, got none' in capsys.readouterr().err
    assert train_pruner.main(_pruner_command(bags, bundle, tmp_path / 'first')) == 0
    before = _pruner(bundle)
    assert train_pruner.main([*more, '--add']) == 0
    after = _pruner(bundle)
    assert after.sparsities == (0.6, 0.7, 0.8)
    assert all(torch.equal(after.table(s), before.table(s)) for s in before.sparsities)
    reports = json.loads((tmp_path / 'more' / 'report.json').read_text())
    assert [report['sparsity'] for report in reports] == [0.7]


def test_an_episode_too_short_for_a_second_tick_teaches_no_pruner(
    bundle: Path, tmp_path: Path
) -> None:
    bundle, bags = Path(shutil.copytree(bundle, tmp_path / 'bundle')), tmp_path / 'bags'
    for name, frames in (('a', 20), ('b', 20), ('c', 8)):
        Recording(frames=frames).write(bags / name)
    assert train_pruner.main(_pruner_command(bags, bundle, tmp_path)) == 0


def test_a_resumed_search_ends_where_an_uninterrupted_one_does(
    bags: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path(shutil.copytree(bundle, tmp_path / 'whole'))
    assert train_pruner.main(_pruner_command(bags, whole, tmp_path / 'out_whole')) == 0
    resumed = Path(shutil.copytree(bundle, tmp_path / 'resumed'))
    command = _pruner_command(bags, resumed, tmp_path / 'out_resumed')
    train_step = PrunerTrainer.train_step
    for stop in (1, 2, 3):

        def interrupted(trainer: PrunerTrainer, stop: int = stop) -> tuple:
            if trainer.step == stop:
                raise KeyboardInterrupt
            return train_step(trainer)

        with monkeypatch.context() as patch:
            patch.setattr(PrunerTrainer, 'train_step', interrupted)
            assert train_pruner.main(command) == 130
    assert train_pruner.main(command) == 0
    assert torch.equal(_pruner(resumed).tables, _pruner(whole).tables)


@pytest.mark.slow
def test_processes_that_share_the_batches_decide_as_one_does(
    bags: Path, bundle: Path, tmp_path: Path
) -> None:
    errors = []
    for name, start in (
        ('one', []),
        ('two', ['torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m']),
    ):
        copied = Path(shutil.copytree(bundle, tmp_path / name))
        command = _pruner_command(bags, copied, tmp_path / f'out_{name}')
        module = ['-m', *start, 'tts_policy.train.train_pruner']
        run = subprocess.run(
            [sys.executable, *module, *command], capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        assert _pruner(copied).spec.sparsities == (0.6, 0.8)
        log = (tmp_path / f'out_{name}' / 'log.csv').read_text().splitlines()[1:]
        errors.append([float(value) for row in log for value in row.split(',')[3:]])
    # Sums are rounded otherwise, so that flips that hardly differ may come in another order.
    assert errors[1] == pytest.approx(errors[0], rel=1e-4, abs=2e-5)


GATHERING = """
import torch
from tts_policy.train.replicas import Replicas

own = Replicas.joined()
share = own.share(list(range(5)))
assert own.count == 3 and len(share) < 5, own
assert own.gathered(torch.tensor(share, dtype=torch.float32), 5).tolist() == [0, 1, 2, 3, 4]
assert own.gathered(torch.zeros(len(own.share('x'))), 1).tolist() == [0]
assert own.summed(torch.full((2, 2), 1.0 + own.rank)).tolist() == [[6, 6], [6, 6]]
assert own.of_first({'made': 7} if own.is_first else None) == {'made': 7}
own.leave()
"""


@pytest.mark.slow
def test_processes_gather_what_each_of_them_knows(tmp_path: Path) -> None:
    script = tmp_path / 'gathering.py'
    script.write_text(GATHERING)
    command = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '3', script]
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@given(st.integers(1, 9), st.integers(0, 40))
def test_shares_of_a_batch_are_a_part_of_it_each(count: int, total: int) -> None:
    items = list(range(total))
    shares = [Replicas(rank, count).share(items) for rank in range(count)]
    assert [item for share in shares for item in share] == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_run_of_other_settings_is_not_continued(
    bags: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(bundle, tmp_path / 'bundle'))
    command = _pruner_command(bags, bundle, tmp_path)
    assert train_pruner.main(command) == 0
    assert train_pruner.main([*command, '--seed', '1']) == 2
    assert '--seed: this run began with 0, got 1' in capsys.readouterr().err


def test_plans_of_another_bundle_are_starts(bags: Path, bundle: Path, tmp_path: Path) -> None:
    prior = Path(shutil.copytree(bundle, tmp_path / 'prior'))
    assert train_pruner.main(_pruner_command(bags, prior, tmp_path / 'out_prior')) == 0
    bundle = Path(shutil.copytree(bundle, tmp_path / 'bundle'))
    # A search of one step: with the prior it begins where two steps had come to.
    first = _pruner_command(bags, bundle, tmp_path / 'out')
    first[first.index('--steps') + 1] = '1'
    assert train_pruner.main([*first, '--prior', str(bundle)]) == 2
    assert train_pruner.main([*first, '--prior', str(prior)]) == 0
    errors = [
        min(float(row['kept_back']) for row in csv.DictReader(log.open()))
        for log in (tmp_path / 'out_prior' / 'log.csv', tmp_path / 'out' / 'log.csv')
    ]
    assert errors[1] <= errors[0]


@pytest.mark.parametrize(
    ('arguments', 'reason'),
    [
        (['--sampler', 'euler'], "one of ['ddim10', 'ddpm100'], got 'euler'"),
        (['--sampler', 'ddim10', '--prior-sampler', 'ddim10'], '--prior expected with it'),
        (['--sampler', 'ddim10', '--bundle', 'absent'], 'bundle file expected at absent'),
        (['--sampler', 'ddim10', '--sparsities', '0.95'], 'must be in (0, 0.9], got 0.95'),
        (['--sampler', 'ddim10', '--held-out', '1', '--ticks', '1'], 'of 2 or more, 8 frames'),
    ],
)
def test_bad_input_of_train_pruner_gets_one_line(
    bags: Path,
    bundle: Path,
    tmp_path: Path,
    arguments: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [str(bags), '--bundle', str(bundle), '--out', str(tmp_path), *arguments]
    assert train_pruner.main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith('train_pruner: ') and reason in error


def test_a_diffusion_transformer_with_a_flow_is_trained_pruned_and_compared(
    bags: Path, tmp_path: Path
) -> None:
    # Blocks begin with gates of zero: large steps open them.
    kind = ['--denoiser', 'dit', '--objective', 'flow', '--learning-rate', '0.3']
    steps = ['--steps', '6', '--encoder-steps', '2']
    assert train_policy.main([str(bags), '--out', str(tmp_path), *kind, *steps, *SMALL]) == 0
    bundle = tmp_path / 'bundle'
    command = _pruner_command(bags, bundle, tmp_path / 'pruner')
    command[command.index('ddim10')] = 'flow10'
    assert train_pruner.main(command) == 0
    for report in json.loads((tmp_path / 'pruner' / 'report.json').read_text()):
        errors = {name: arm['mean'] for name, arm in report['l1_error'].items()}
        assert 1e-4 < errors['learned'] < errors['random'] < 1.0
    assert TestTimeSparsePolicy.from_bundle(bundle, 'flow10').max_sparsity == pytest.approx(0.9)
