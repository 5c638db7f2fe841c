# SPDX-License-Identifier: Apache-2.0
"""The Push-T environment: its score, its picture, and resetting to a recorded state."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip('gym_pusht', reason='gym-pusht is not installed')

from tts_policy.sim.tasks.pusht import AGENT_AXES, BLOCK_AXES, PushTWorld, replay

KEY_POINTS = {0: (201.8135, 293.5951), 4: (220.5748, 258.0041)}
GOAL = np.array([300.0, 100.0, 256.0, 256.0, np.pi / 4])


@pytest.fixture(scope='module')
def pusht() -> PushTWorld:
    return PushTWorld()


def test_a_state_is_restored(pusht: PushTWorld) -> None:
    state = np.array([300.0, 100.0, 180.0, 330.0, 2.0])
    pusht.reset_to(state)
    assert pusht.state() == pytest.approx(state, abs=1e-6)
    assert pusht.agent() == pytest.approx(state[:2])


def test_key_points_turn_and_move_with_the_block(pusht: PushTWorld) -> None:
    # A frame of the data set: its state, and its first and fifth key point.
    pusht.reset_to(np.array([222.0, 97.0, 222.9938, 381.5990, 3.0080]))
    seen = pusht.positions()
    assert list(seen) == [*BLOCK_AXES, *AGENT_AXES]
    assert (seen['agent_x'], seen['agent_y']) == pytest.approx((222.0, 97.0), abs=0.5)
    assert (seen['block0_x'], seen['block0_y']) == pytest.approx(KEY_POINTS[0], abs=0.1)
    assert (seen['block4_x'], seen['block4_y']) == pytest.approx(KEY_POINTS[4], abs=0.1)


def test_the_score_is_the_largest_reward_of_the_episode(pusht: PushTWorld) -> None:
    pusht.reset_to(GOAL)
    assert pusht.step(GOAL[:2]) == pytest.approx(1.0)
    rewards = [pusht.step(np.array([256.0, 480.0])) for _ in range(15)]
    assert min(rewards) < 0.9, 'the finger pushed the block out of its outline'
    assert pusht.score == pytest.approx(1.0)
    pusht.reset(1)
    assert pusht.score == 0.0


def test_a_replay_from_the_same_state_is_the_same(pusht: PushTWorld) -> None:
    state = np.array([300.0, 100.0, 180.0, 330.0, 2.0])
    actions = np.linspace([300, 100], [180, 420], 30)
    assert replay(pusht, state, actions) == replay(pusht, state, actions)


def test_the_picture_shows_the_block_and_changes_with_it(pusht: PushTWorld) -> None:
    pusht.reset_to(GOAL)
    before = pusht.render()
    assert (before.shape, before.dtype) == ((96, 96, 3), np.uint8)
    pusht.reset_to(GOAL + [0, 0, 80, 0, 0])
    changed = (before.astype(int) - pusht.render()).any(axis=-1).sum()
    assert 100 < changed < 3000
