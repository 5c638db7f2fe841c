# SPDX-License-Identifier: Apache-2.0
"""The tasks beside Lift: their experts finish them, their rules and cameras are right."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip('robosuite', reason='robosuite is not installed')

from tts_policy.sim.demonstration import Demonstration, demonstrate
from tts_policy.sim.panda import COMMAND_JOINTS, FINGER_OPEN_M, HOME_RAD
from tts_policy.sim.tasks import PANDA_TASKS, TASKS, panda_task
from tts_policy.sim.tasks.can import RELEASE_M, REST_HEIGHT_M, CanWorld
from tts_policy.sim.tasks.stack import RANGE_M, StackWorld

HOME = dict(zip(COMMAND_JOINTS, (*HOME_RAD, FINGER_OPEN_M), strict=True))


@pytest.fixture(scope='module')
def stack() -> Iterator[StackWorld]:
    with StackWorld() as world:
        yield world


@pytest.fixture(scope='module')
def can() -> Iterator[CanWorld]:
    with CanWorld() as world:
        yield world


@pytest.fixture
def world_of(request: pytest.FixtureRequest, world: Any) -> Any:
    return lambda name: world if name == 'lift' else request.getfixturevalue(name)


def demonstration(name: str, world: Any, seed: int, noise_rad: float) -> Demonstration:
    task = panda_task(name)
    expert = task.expert(world)
    return demonstrate(world, expert, seed, noise_rad, False, task.frame_limit)


@pytest.mark.parametrize('name', ['stack', 'can'])
@pytest.mark.parametrize('noise_rad', [0.0, 0.01])
def test_the_expert_finishes_the_task(name: str, noise_rad: float, world_of: Any) -> None:
    for seed in range(300_000, 300_003):
        shown = demonstration(name, world_of(name), seed, noise_rad)
        assert shown.success, f'seed {seed}'
        assert len(shown.commands) < panda_task(name).frame_limit * 0.7


@pytest.mark.parametrize('name', ['stack', 'can'])
def test_a_seed_gives_bitwise_the_same_world_whatever_came_before(
    name: str, world_of: Any
) -> None:
    world = world_of(name)
    states = []
    for seed in (5, 6, 5):
        world.reset(seed)
        for _ in range(10):
            world.step(HOME)
        states.append(world.data.qpos.copy())
    assert np.array_equal(states[0], states[2])
    assert not np.array_equal(states[0], states[1])


def test_lift_is_what_it_was_when_its_bundle_was_trained(world: Any) -> None:
    """Recorded before there were other tasks; the same to the last bit on one machine."""
    shown = demonstration('lift', world, 100_000, 0.0)
    assert len(shown.commands) == 48
    command = [-0.0117, 0.704868, -0.000675, -2.311736, 0.003506, 3.016603, 0.785554, 0.005051]
    assert shown.commands[30] == pytest.approx(command, abs=2e-4)
    end = [-0.010489, 0.434305, -0.001689, -2.413376, 0.002564, 2.84763, 0.780892, 0.020047]
    assert shown.states[-1, :8] == pytest.approx(end, abs=2e-4)


def test_the_cubes_never_overlap_and_fill_their_range(stack: StackWorld) -> None:
    red, green = [], []
    for seed in range(40):
        stack.reset(seed)
        red.append(stack.position(stack.red))
        green.append(stack.position(stack.green))
    assert np.linalg.norm(np.array(red) - green, axis=1).min() > 0.06
    both = np.concatenate([red, green])[:, :2]
    assert np.abs(both).max() < RANGE_M + 2e-3
    assert (both.min(0) < -0.06).all() and (both.max(0) > 0.06).all()


def test_a_stack_counts_once_the_red_cube_rests_on_the_green_one(stack: StackWorld) -> None:
    stack.reset(1)
    assert not stack.success()
    x, y, z = stack.position(stack.green)
    stack.place_upright(stack.red, (x, y, z + stack.stacked_height_m + 0.03), 0.3)
    stack.step(HOME)
    assert not stack.success(), 'it does not touch yet'
    for _ in range(40):
        stack.step(HOME)
    assert stack.success()


def test_a_can_counts_in_its_corner_of_the_target_bin_only(can: CanWorld) -> None:
    can.reset(1)
    assert not can.success()
    for (x, y), inside in ((RELEASE_M, True), ((0.0, 0.4), False), ((0.2, 0.15), False)):
        can.place_upright(can.can, (x, y, REST_HEIGHT_M), 0.0)
        can.step(HOME)
        assert can.success() is inside
    can.place_upright(can.can, tuple(can.grip_position()), 0.0)
    assert not can.success()


def pixels(picture: np.ndarray, channel: int) -> np.ndarray:
    others = [picture[..., i].astype(int) for i in range(3) if i != channel]
    return (picture[..., channel] > 50) & (picture[..., channel] > 1.5 * np.maximum(*others))


def test_every_object_is_in_the_picture_wherever_it_lies(stack: StackWorld, can: CanWorld) -> None:
    for seed in range(12):
        stack.reset(seed)
        can.reset(seed)
        picture = stack.render()
        for seen, least in (
            (pixels(picture, 0), 40),
            (pixels(picture, 1), 40),
            (pixels(can.render(), 0), 15),
        ):
            assert seen.sum() > least, f'seed {seed}'
            edge = np.concatenate([seen[0], seen[-1], seen[:, 0], seen[:, -1]])
            assert not edge.any(), f'seed {seed}'


def test_an_unknown_task_is_refused_naming_those_there_are() -> None:
    reason = f"task: expected one of {list(PANDA_TASKS)}, got 'juggle'"
    with pytest.raises(ValueError, match=re.escape(reason)):
        panda_task('juggle')
    assert [TASKS[name].name for name in TASKS] == list(TASKS)
