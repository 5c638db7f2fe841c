# SPDX-License-Identifier: Apache-2.0
"""Recording, training, converting and evaluating need no ROS: every package of it is blocked."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL_NETWORK = '--width 32 --layers 2 --batch 4 --threads 1 --steps 6 --encoder-steps 2'
# What a ROS installation or its wheels bring.
BLOCKED = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition('.')[0]
        if top in ('rclpy', 'launch', 'launch_ros', 'ament_index_python', 'rosidl_runtime_py') or (
            top.endswith(('_msgs', '_srvs', '_interfaces'))
        ):
            raise ImportError(f'{name}: no ROS here')
sys.meta_path.insert(0, Blocked())
from importlib import import_module
module, *arguments = sys.argv[1:]
sys.exit(import_module(module).main(arguments))
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., str]:
    """Run the main of a module in a process that has no ROS; returns what it printed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(('ROS_', '_ROS'))}
    environment |= {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'HOME': str(tmp_path)}

    def main(module: str, *arguments: str | Path) -> str:
        command = [sys.executable, '-c', BLOCKED, module, *map(str, arguments)]
        ended = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    return main


@pytest.mark.slow
def test_from_demonstrations_to_an_evaluated_bundle(
    run: Callable[..., str], tmp_path: Path
) -> None:
    pytest.importorskip('robosuite', reason='robosuite is not installed')
    demonstrations, policy, out = (tmp_path / name for name in ('demos', 'policy', 'results'))
    run('tts_policy.sim.collect', '--episodes', '3', '--out', demonstrations, '--workers', '1')
    run(
        'tts_policy.train.train_policy',
        demonstrations,
        *f'--out {policy} --held-out 1 {SMALL_NETWORK}'.split(),
    )
    bundle = policy / 'bundle'
    run(
        'tts_policy.train.train_pruner',
        demonstrations,
        *f'--bundle {bundle} --sampler ddim10 --out {tmp_path / "pruner"} --held-out 1'.split(),
        *['--sparsities', '0.8', '--steps', '1', '--threads', '1'],
    )
    options = '--variants ddim10:learned:0.8 --episodes 1 --sequences 1'
    run('tts_policy.evaluate.evaluate_policy', f'lift={bundle}', '--out', out, *options.split())
    assert 'ddim10' in (out / 'results.json').read_text()


def test_a_checkpoint_of_another_project_is_converted(
    run: Callable[..., str], tmp_path: Path
) -> None:
    from layouts import Sizes, save_lowdim

    save_lowdim(tmp_path / 'policy.ckpt', Sizes())
    names = '--observation-joints a b c d e --action-joints x y z --rate 20'
    run(
        'tts_policy.convert.convert_checkpoint',
        tmp_path / 'policy.ckpt',
        tmp_path / 'bundle',
        *names.split(),
    )
    assert (tmp_path / 'bundle' / 'model.yaml').is_file()


def test_what_is_blocked_cannot_be_imported(run: Callable[..., str]) -> None:
    with pytest.raises(AssertionError, match='no ROS here'):
        run('tts_policy.node.policy_node')
