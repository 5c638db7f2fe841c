# SPDX-License-Identifier: Apache-2.0
"""Training of pruners end to end on small recordings: plans in the bundle, resumed and refused."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from bags import Recording
from small_training import SMALL

from tts_policy.data import evaluate_bag
from tts_policy.policy.bundle import load_bundle, save_bundle
from tts_policy.policy.policy import TestTimeSparsePolicy
from tts_policy.policy.pruner import Pruner
from tts_policy.train import train_policy, train_pruner
from tts_policy.train.pruner_trainer import PrunerTrainer

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


def _short_command(bags: Path, bundle: Path, out: Path) -> list[str]:
    """One step for one sparsity, of a sampler's recommendation."""
    command = _pruner_command(bags, bundle, out)
    first = command.index('--sparsities')
    return [*command[:first], *command[first + 3 :], '--steps', '1']


def _pruner(bundle: Path) -> Pruner:
    pruner = load_bundle(bundle).sampler('ddim10')[1]
    assert pruner is not None
    return pruner


def test_a_pruner_for_every_sparsity_is_added_to_the_bundle_and_compared(
    bags: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(bundle, tmp_path / 'bundle'))
    topics = ['--topic', 'joints:=/joint_states', '--topic', 'camera:=/camera/image']
    assert train_pruner.main([*_pruner_command(bags, bundle, tmp_path), *topics]) == 0
    command, *words = shlex.split(capsys.readouterr().out.splitlines()[-1].split('next: ')[1])
    given = evaluate_bag.parse_arguments(words)
    assert (command, given.bags, given.bundle) == ('evaluate_bag', [bags], bundle)
    assert given.topic == topics[1::2]
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
    assert 'expected a pruner with tables for 6 blocks, got none' in capsys.readouterr().err
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
    for name, frames in (('a', 20), ('b', 20), ('c', 8), ('d', 20)):
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


def test_a_run_of_other_settings_is_not_continued(
    bags: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(bundle, tmp_path / 'bundle'))
    command = _pruner_command(bags, bundle, tmp_path)
    assert train_pruner.main(command) == 0
    assert train_pruner.main([*command, '--seed', '1']) == 2
    assert '--seed: expected 0, with which this run began, got 1' in capsys.readouterr().err


def _change_policy(bundle: Path) -> None:
    """Train the policy of a bundle anew, as it were; pruners are not kept."""
    loaded = load_bundle(bundle)
    with torch.no_grad():
        next(loaded.network.denoiser.parameters()).mul_(1.5)
    samplers = {name: spec for name, (spec, _) in loaded.samplers.items()}
    save_bundle(bundle, loaded.name, loaded.network, samplers)


def _change_sampler(bundle: Path, **changes: float) -> None:
    model = yaml.safe_load((bundle / 'model.yaml').read_text())
    model['samplers']['ddim10'].update(changes)
    (bundle / 'model.yaml').write_text(yaml.safe_dump(model, sort_keys=False))


def _refused(command: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> bool:
    assert train_pruner.main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    return error.startswith('train_pruner: ') and reason in error


@pytest.fixture
def searched(bags: Path, bundle: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """A bundle of its own for which a search has been made, and the command of that search."""
    own = Path(shutil.copytree(bundle, tmp_path / 'bundle'))
    command = _short_command(bags, own, tmp_path / 'out')
    assert train_pruner.main(command) == 0
    return own, command


def test_plans_of_a_policy_are_not_given_to_another(
    searched: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, command = searched
    # The pruner that it made does not keep it from being repeated.
    assert train_pruner.main(command) == 0
    _change_sampler(bundle, temperature=0.5)
    assert _refused(command, 'sampler of --bundle: expected ', capsys)
    _change_sampler(bundle, temperature=1.0)
    _change_policy(bundle)
    assert _refused(command, 'policy of --bundle: expected ', capsys)
    assert load_bundle(bundle).sampler('ddim10')[1] is None


def test_a_search_is_continued_at_the_sparsities_that_it_began_with(
    searched: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, command = searched
    assert train_pruner.main([*command, '--sparsities', '0.8']) == 0
    _change_sampler(bundle, recommended_sparsity=0.7)
    assert _refused(
        command, '--sparsities: expected [0.8], with which this run began, got [0.7]', capsys
    )


def test_a_search_is_continued_with_the_prior_that_it_began_with(
    bags: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prior = Path(shutil.copytree(bundle, tmp_path / 'prior'))
    assert train_pruner.main(_short_command(bags, prior, tmp_path / 'out_prior')) == 0
    bundle = Path(shutil.copytree(bundle, tmp_path / 'bundle'))
    command = _short_command(bags, bundle, tmp_path / 'out')
    assert train_pruner.main([*command, '--prior', str(prior)]) == 0
    moved = prior.rename(tmp_path / 'moved')
    assert train_pruner.main([*command, '--prior', str(moved)]) == 0
    assert _refused(command, 'plans of --prior: expected ', capsys)


def test_noise_that_is_drawn_for_every_chunk_is_refused(
    bags: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(bundle, tmp_path / 'bundle'))
    command = _short_command(bags, bundle, tmp_path / 'out')
    _change_sampler(bundle, hold_noise=False)
    assert _refused(command, "expected 'ddim10' to have hold_noise", capsys)
    _change_sampler(bundle, temperature=0.0)
    assert train_pruner.main(command) == 0


@pytest.mark.parametrize(
    ('option', 'value', 'least'),
    [
        ('--steps', '0', 1),
        ('--batch', '0', 1),
        ('--sample', '0', 1),
        ('--trials', '0', 1),
        ('--episodes', '0', 2),
        ('--episodes', '1', 2),
        ('--ticks', '1', 2),
        ('--seed', '-1', 0),
    ],
)
def test_numbers_that_no_search_can_do_with_are_refused(
    option: str, value: str, least: int, capsys: pytest.CaptureFixture[str]
) -> None:
    # Before anything is read.
    command = ['absent', '--bundle', 'absent', '--sampler', 'ddim10', '--out', 'absent']
    assert train_pruner.main([*command, option, value]) == 2
    expected = f'{option}: expected at least {least}, got {value}'
    assert capsys.readouterr().err == f'train_pruner: {expected}\n'


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
        (['--sampler', 'euler'], "expected one of ddim10, ddpm100, got 'euler'"),
        (['--sampler', 'ddim10', '--prior-sampler', 'ddim10'], 'expected --prior with it'),
        (
            ['--sampler', 'ddim10', '--bundle', 'absent'],
            'absent/model.yaml: expected a bundle file',
        ),
        (['--sampler', 'ddim10', '--sparsities', '0.95'], 'expected in (0, 0.9], got 0.95'),
        (['--sampler', 'ddim10', '--held-out', '2'], '2 or more episodes of more than 8 windows'),
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
