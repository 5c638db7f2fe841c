# SPDX-License-Identifier: Apache-2.0
"""Training end to end on small recordings: bags to bundle to pruner, resumed and repeated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from bags import Recording
from torch import Tensor

from tts_policy.core.bundle import load_bundle
from tts_policy.core.engine import denoise_masked
from tts_policy.core.plan import Reuse, make_plan
from tts_policy.core.policy import TestTimeSparsePolicy
from tts_policy.train import train_policy, train_pruner
from tts_policy.train.sparse_student import CellGates, SparseStudent, soft_gates
from tts_policy.train.tick_sequences import DenseTeacher, TickSequence

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


def test_a_pruner_is_added_to_the_bundle_and_compared(
    bags: Path, bundle: Path, tmp_path: Path
) -> None:
    command = [str(bags), '--bundle', str(bundle), '--sampler', 'ddim10', '--out', str(tmp_path)]
    sizes = ['--steps', '2', '--batch', '2', '--episodes', '2', '--ticks', '2', '--held-out', '1']
    assert train_pruner.main([*command, *sizes]) == 0
    report = json.loads((tmp_path / 'report.json').read_text())
    assert set(report['l1_error']) == {'learned', 'constant', 'other_tick', 'static', 'random'}
    assert all(
        arm['realised_sparsity'] == pytest.approx(0.8) for arm in report['l1_error'].values()
    )
    assert TestTimeSparsePolicy.from_bundle(bundle, 'ddim10').max_sparsity == pytest.approx(0.9)
    assert TestTimeSparsePolicy.from_bundle(bundle, 'ddpm100').max_sparsity == 0.0


@pytest.mark.parametrize(
    ('arguments', 'reason'),
    [
        (['--sampler', 'euler'], "one of ['ddim10', 'ddpm100'], got 'euler'"),
        (['--sampler', 'ddim10', '--bundle', 'absent'], 'bundle file expected at absent'),
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


def test_the_differentiable_loop_follows_the_engine_and_gates_get_gradients(bundle: Path) -> None:
    loaded = load_bundle(bundle)
    network = loaded.network.eval().requires_grad_(False)
    sampler, _ = loaded.sampler('ddim10')
    teacher = DenseTeacher(network, sampler)
    generator = torch.Generator().manual_seed(0)
    size = network.denoiser.spec.obs_features
    sequences = [TickSequence(torch.randn(3, 2, size, generator=generator), n) for n in range(3)]
    with torch.no_grad():
        student_lattices = [teacher.first_tick(sequence) for sequence in sequences]
        engine_lattices = [teacher.first_tick(sequence) for sequence in sequences]
    rng = np.random.default_rng(0)
    for tick in (1, 2):
        values = rng.standard_normal((3, 10, 6, 4)).astype(np.float32)
        valid = [lattice.rollout_valid(9) for lattice in student_lattices]
        plans = [make_plan(v, 0.7, r, False) for v, r in zip(values, valid, strict=True)]
        logits = torch.tensor(values, requires_grad=True)
        gates = CellGates(
            np.stack(plans), soft_gates(logits, plans, valid), rng.random((10, 6)) < 0.3
        )
        teacher.memory.encode(torch.stack([s.features[tick] for s in sequences]))
        student = SparseStudent(
            teacher.denoiser, teacher.scheduler, teacher.memory, student_lattices
        )
        actions = student.tick(gates)
        actions.abs().sum().backward()
        assert logits.grad is not None and torch.isfinite(logits.grad).all()
        touched = (logits.grad != 0).any(dim=-1)
        computed = torch.from_numpy(np.stack(plans) == Reuse.COMPUTE).any(dim=0)
        assert touched[:, ~(computed | torch.from_numpy(gates.candidates))].sum() == 0
        assert touched.float().mean() > 0.3
        with torch.no_grad():
            for n, (sequence, lattice) in enumerate(zip(sequences, engine_lattices, strict=True)):
                teacher.memory.encode(sequence.features[tick : tick + 1])
                expected, _ = denoise_masked(
                    teacher.denoiser,
                    teacher.scheduler,
                    teacher.memory,
                    lattice,
                    lambda plan=plans[n]: plan,
                    False,
                )
                lattice.commit(plans[n])
                assert (actions[n] - expected[0]).abs().max() < 1e-5
