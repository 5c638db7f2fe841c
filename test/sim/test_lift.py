# SPDX-License-Identifier: Apache-2.0
"""The simulated world: the same seed gives the same world, and the camera sees the cube."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip('robosuite', reason='robosuite is not installed')

from tts_policy.sim.episode import Episode, Timeline
from tts_policy.sim.panda import COMMAND_JOINTS, FRAME_NS, HOME_RAD, STATE_JOINTS
from tts_policy.sim.tasks.lift import CUBE_RANGE_M, LiftWorld
from tts_policy.sim.trajectory_player import TrajectoryPoint

HOME = dict(zip(COMMAND_JOINTS, (*HOME_RAD, 0.04), strict=True))


def cube_pose(world: LiftWorld) -> np.ndarray:
    return world.data.qpos[world.cube_qpos : world.cube_qpos + 7].copy()


def motion(world: LiftWorld, seed: int) -> tuple[np.ndarray, np.ndarray]:
    world.reset(seed)
    for step in range(40):
        world.step({**HOME, 'panda_joint2': HOME_RAD[1] + 0.01 * step})
    return world.data.qpos.copy(), world.render()


def test_a_seed_gives_bitwise_the_same_world_whatever_came_before(world):
    first, picture = motion(world, 5)
    motion(world, 6)
    again, same_picture = motion(world, 5)
    assert np.array_equal(first, again)
    assert np.array_equal(picture, same_picture)


def test_seeds_spread_the_cube_over_the_whole_range_and_every_yaw(world):
    poses = []
    for seed in range(60):
        world.reset(seed)
        poses.append(cube_pose(world))
    xy = np.array(poses)[:, :2]
    yaw = 2 * np.arctan2(np.array(poses)[:, 6], np.array(poses)[:, 3])
    assert np.abs(xy).max() <= CUBE_RANGE_M + 1e-3
    assert (xy.min(0) < -0.08).all()
    assert (xy.max(0) > 0.08).all()
    assert len(np.unique(np.floor((yaw % (2 * np.pi)) / (np.pi / 4)))) == 8


def test_the_arm_rests_at_home_and_follows_its_set_points(world):
    world.reset(1)
    assert tuple(world.joint_positions()) == STATE_JOINTS
    for _ in range(50):
        world.step(HOME)
    rest = world.joint_positions()
    assert [rest[name] for name in COMMAND_JOINTS] == pytest.approx(list(HOME.values()), abs=1e-3)
    goal = {**HOME, 'panda_joint1': 0.3, 'panda_finger_joint1': 0.01}
    for _ in range(100):
        world.step(goal)
    there = world.joint_positions()
    assert [there[name] for name in COMMAND_JOINTS] == pytest.approx(list(goal.values()), abs=2e-3)
    assert there['panda_finger_joint2'] == pytest.approx(0.01, abs=2e-3)
    assert not world.success()


def test_success_is_the_cube_more_than_four_centimetres_above_the_table(world):
    world.reset(1)
    for height, lifted in ((0.839, False), (0.841, True)):
        world.data.qpos[world.cube_qpos + 2] = height
        assert world.success() is lifted


def test_the_cube_is_in_the_picture_wherever_it_lies(world):
    for seed in range(20):
        world.reset(seed)
        picture = world.render()
        assert (picture.shape, picture.dtype) == ((96, 96, 3), np.uint8)
        red, green, blue = (picture[..., i].astype(int) for i in range(3))
        cube = (red > 60) & (red > 2 * green) & (red > 2 * blue)
        assert cube.sum() > 60, f'seed {seed}'
        edge = np.concatenate([cube[0], cube[-1], cube[:, 0], cube[:, -1]])
        assert not edge.any(), f'seed {seed}'


def test_rendering_does_not_change_the_world(world):
    world.reset(3)
    before = world.data.qpos.copy(), world.data.qvel.copy(), world.data.time
    world.render()
    assert np.array_equal(before[0], world.data.qpos)
    assert np.array_equal(before[1], world.data.qvel)
    assert before[2] == world.data.time


def test_ticks_are_due_from_the_second_frame_on_and_time_ends_the_episode(world):
    episode = Episode(world, 4, 10**9, Timeline(limit_ns=20 * FRAME_NS))
    ticks, frames = [], 0
    while episode.ended is None:
        frames += episode.frame_due
        if episode.tick_due:
            ticks.append(episode.elapsed_ns // FRAME_NS)
        episode.step()
    assert (ticks, frames, episode.ended) == ([1, 9, 17], 20, 'time limit')
    with pytest.raises(RuntimeError, match='seed 4 has ended: time limit'):
        episode.step()


@pytest.mark.parametrize(('execute', 'steps'), [(8, 2), (2, 2), (1, 3), (4, 1), (3, 5)])
def test_frames_seen_at_a_tick_are_the_last_of_its_window(world, execute, steps):
    timeline = Timeline(execute * FRAME_NS, 20 * FRAME_NS)
    episode, due, seen, ticks = Episode(world, 4, 10**9, timeline), [], set(), []
    while episode.ended is None:
        if episode.frame_due:
            due.append(episode.now_ns)
        if episode.seen_at_tick(steps):
            seen.add(episode.now_ns)
        if episode.tick_due:
            ticks.append(set(due[-steps:]))
        episode.step()
    assert set().union(*ticks) <= seen <= set(due)
    # What is seen beyond that belongs to a tick after the end.
    assert all(stamp > due[-steps] for stamp in seen - set().union(*ticks))


def test_an_episode_follows_an_accepted_trajectory(world):
    episode = Episode(world, 4, 10**9, Timeline())
    goal = [*HOME_RAD, 0.02]
    episode.accept(COMMAND_JOINTS, [TrajectoryPoint(FRAME_NS, goal)], episode.now_ns)
    for _ in range(80):
        episode.step()
    assert world.joint_positions()['panda_finger_joint1'] == pytest.approx(0.02, abs=2e-3)


@pytest.mark.parametrize('seconds', [0.0, 0.43, -1.0])
def test_a_period_that_no_camera_stamp_meets_is_refused(seconds):
    with pytest.raises(ValueError, match='action_period_ns: expected a positive multiple'):
        Timeline.from_seconds(seconds, 6.0)
