# SPDX-License-Identifier: Apache-2.0
"""Push-T beside the tasks of the robot arm: what a policy sees, and how it is scored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('robosuite', reason='robosuite is not installed')

from tts_policy.evaluate import evaluate_policy
from tts_policy.policy.bundle import save_random_bundle
from tts_policy.policy.contract import ActionSpec, ObservationSpec, PolicyContract
from tts_policy.policy.network import NetworkSpec
from tts_policy.policy.policy import TestTimeSparsePolicy
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.policy.schedulers.scheduler import SchedulerSpec
from tts_policy.sim.panda import PANDA_CONTRACT
from tts_policy.sim.task import TaskError
from tts_policy.sim.tasks import TASKS, task_named
from tts_policy.sim.tasks.pusht import AGENT_AXES, BLOCK_AXES

CONTRACT = PolicyContract(
    ObservationSpec((), (*BLOCK_AXES, *AGENT_AXES), steps=2, period_s=0.1),
    ActionSpec(AGENT_AXES, horizon=16, execute=8, offset_steps=0),
)


@pytest.fixture(scope='module')
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('bundle')
    samplers = {'ddim4': SamplerSpec(SchedulerSpec('ddim', 4))}
    save_random_bundle(folder, CONTRACT, samplers, NetworkSpec(width=16, layers=1, heads=2))
    return folder


@pytest.mark.parametrize('name', ['lift', 'stack', 'can'])
def test_every_task_of_the_arm_takes_its_contract(name: str) -> None:
    task_named(name).check(PANDA_CONTRACT)
    assert task_named(name).bundle == Path(f'models/panda_{name}')


@pytest.mark.parametrize('name', list(TASKS))
def test_a_policy_of_another_robot_is_refused(name: str) -> None:
    other = replace(PANDA_CONTRACT, action=replace(PANDA_CONTRACT.action, joints=('wheel',)))
    with pytest.raises(TaskError, match=r'joints: expected some of .*, got'):
        task_named(name).check(other)


def test_a_policy_of_another_robot_ends_the_command_in_one_line(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate_policy.main([f'lift={bundle}', '--out', str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "got ['agent_x', 'agent_y', 'block0_x'" in error and error.count('\n') == 1


def test_an_episode_depends_on_its_seed_alone(bundle: Path) -> None:
    pytest.importorskip('gym_pusht', reason='gym-pusht is not installed')
    task = task_named('pusht')
    policy = TestTimeSparsePolicy.from_bundle(bundle, threads=1)
    first = task.run(policy, 7, 0.5, 8, False)
    other = task.run(policy, 8, 0.5, 8, False)
    again = task.run(policy, 7, 0.5, 8, False)
    assert len(first.chunks) == 38 and first.duration_s == pytest.approx(30.0)
    assert first.score == again.score and not first.success
    for a, b in zip(first.chunks, again.chunks, strict=True):
        assert np.array_equal(a.actions, b.actions)
    assert not np.array_equal(first.chunks[0].actions, other.chunks[0].actions)
    assert first.chunks[1].stats.sparsity == pytest.approx(0.5)


def test_a_policy_is_evaluated_sparse_from_the_command_line(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip('gym_pusht', reason='gym-pusht is not installed')
    command = [f'pusht={bundle}', '--workers', '1', '--sequences', '1', '--episodes', '1']
    variants = ['--variants', 'ddim4', 'ddim4:learned:0.5', 'ddim4+blind']
    assert evaluate_policy.main([*command, *variants, '--out', str(tmp_path)]) == 0
    rows = json.loads((tmp_path / 'results.json').read_text())
    assert [row['variant'] for row in rows] == ['ddim4', 'ddim4:learned:0.5']
    assert rows[1]['fe_steady'] == 2.0 and rows[1]['l1_error'] > 0
    assert all(0 <= row['score'] <= 1 for row in rows)
    assert ', score 0.' in (tmp_path / 'results.md').read_text()
