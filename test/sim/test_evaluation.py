# SPDX-License-Identifier: Apache-2.0
"""Headless episodes and the statistics made of them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip('robosuite', reason='robosuite is not installed')
pytest.importorskip('trajectory_msgs', reason='no ROS messages here')

from tts_policy.core.bundle import save_random_bundle
from tts_policy.core.network import NetworkSpec
from tts_policy.core.policy import TestTimeSparsePolicy
from tts_policy.sim import evaluate
from tts_policy.sim.episode import FRAME_NS, Timeline
from tts_policy.sim.evaluate import Arm, wilson_interval
from tts_policy.sim.lift import LiftWorld
from tts_policy.sim.rollout import DeceivedRobot, run_episode
from tts_policy.train.panda_contract import PANDA_CONTRACT, PANDA_SAMPLERS

TINY = NetworkSpec(width=16, layers=1, heads=2, camera_channels=16)


@pytest.fixture(scope='module')
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('bundle')
    save_random_bundle(folder, PANDA_CONTRACT, PANDA_SAMPLERS, TINY)
    return folder


def test_an_episode_depends_on_its_seed_alone(world: Any, bundle: Path) -> None:
    policy = TestTimeSparsePolicy.from_bundle(bundle, 'ddim10', threads=1)
    timeline = Timeline(8 * FRAME_NS, 20 * FRAME_NS)
    first = run_episode(policy, world, 5, 0.8, timeline)
    run_episode(policy, world, 6, 0.8, timeline)
    again = run_episode(policy, world, 5, 0.8, timeline)
    # Ticks at frames 1, 9 and 17; the first is dense.
    assert [round(c.stats.sparsity, 6) for c in first.chunks] == [0.0, 0.8, 0.8]
    for a, b in zip(first.chunks, again.chunks, strict=True):
        assert np.array_equal(a.actions, b.actions) and np.array_equal(a.plan, b.plan)


def test_the_deceived_camera_shows_the_same_arm_and_another_cube(world: Any) -> None:
    shown = LiftWorld()
    deceived = DeceivedRobot(world, shown)
    deceived.reset(3)
    assert deceived.joint_positions() == shown.joint_positions()
    assert np.abs(world.position(world.cube_qpos) - shown.position(shown.cube_qpos)).max() > 0.01
    difference = np.abs(deceived.render().astype(int) - world.render()).max(axis=-1)
    # Two cubes' worth of pixels differ, nothing else.
    assert 100 < (difference > 40).sum() < 1200
    shown.close()


def test_evaluation_is_resumed_and_summarised(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ['ddim10:0.8', '--bundle', str(bundle), '--episodes', '1', '--workers', '1']
    assert evaluate.main([*command, '--out', str(tmp_path)]) == 0
    log = tmp_path / 'episodes.jsonl'
    line = log.read_text()
    rows = json.loads((tmp_path / 'results.json').read_text())
    assert (rows[0]['arm'], rows[0]['episodes'], rows[0]['successes']) == ('ddim10:0.8', 1, 0)
    assert rows[0]['sparsity_steady'] == pytest.approx(0.8)
    assert 0.19 < rows[0]['flops_ratio_steady'] < rows[0]['flops_ratio_episode'] < 0.35
    assert evaluate.main([*command, '--out', str(tmp_path)]) == 0
    assert log.read_text() == line
    assert 'ddim10:0.8' in capsys.readouterr().out


@pytest.mark.parametrize('text', ['ddim10', 'ddim10:x', 'ddim10:0.8:deaf', 'a:0:blind:b'])
def test_arms_off_the_form_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match='an arm is SAMPLER:SPARSITY'):
        Arm.parse(text)


def test_arm_names_are_parsed_back() -> None:
    for arm in (Arm('ddim10', 0.8), Arm('ddpm100', 0.0, blind=True)):
        assert Arm.parse(arm.name) == arm


def test_wilson_interval_of_textbook_values() -> None:
    assert wilson_interval(95, 100) == pytest.approx((0.8882, 0.9785), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
