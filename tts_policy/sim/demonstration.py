# SPDX-License-Identifier: Apache-2.0
"""One demonstration of the expert in the simulated world, on the timeline of the live robot.

Frame f has the stamp f * FRAME_S. Frames 0 and 1 are at rest; the first moving command is issued
at frame 1. The command of a frame is the set-point to be reached one frame later, the arm moves
linearly towards it. With `noise` the executed command is disturbed for a few frames at a time and
the arm starts near its home pose, but the recorded command is always the expert's own correction.

With a `lead` (see `lead.py`) a policy has moved the arm first, and the expert acts from frame 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tts_policy.sim.expert import Expert
from tts_policy.sim.panda import (
    ARM_JOINTS,
    COMMAND_JOINTS,
    STATE_JOINTS,
    STATES_PER_FRAME,
)
from tts_policy.sim.world import World

FRAMES_AFTER_SUCCESS = 16
DISTURBANCE_FRAMES = 4
NOISE_STREAM = 1  # keeps the disturbances of a seed independent of its object poses


@dataclass(frozen=True)
class Demonstration:
    """What a recorder saw during F frames.

    images uint8 [F, H, W, 3]; states [(F - 1) * 5 + 1, 9] every CONTROL_PERIOD_S in the order of
    STATE_JOINTS; commands [F, 8] in the order of COMMAND_JOINTS (rad, finger m).
    """

    seed: int
    success: bool
    images: NDArray[np.uint8]
    states: NDArray[np.float64]
    commands: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.images)

    @staticmethod
    def nothing(seed: int) -> Demonstration:
        """Return the empty demonstration of an episode in which nothing was left to do."""
        return Demonstration(
            seed,
            False,
            np.zeros((0, 0, 0, 3), np.uint8),
            np.zeros((0, len(STATE_JOINTS))),
            np.zeros((0, len(COMMAND_JOINTS))),
        )


class _Disturbance:
    """Offsets of the executed arm command, held for DISTURBANCE_FRAMES, half of the time zero."""

    def __init__(self, seed: int, noise_rad: float) -> None:
        self._rng = np.random.default_rng((NOISE_STREAM, seed))
        self._noise_rad = noise_rad
        self.start_jitter_rad = 2 * noise_rad * float(self._rng.random())

    def offset(self, frame: int) -> NDArray[np.float64]:
        """Offset [7] in rad for this frame; frames must be asked for in order."""
        if frame % DISTURBANCE_FRAMES == 1:
            on = self._rng.random() < 0.5
            self._offset = on * self._noise_rad * self._rng.standard_normal(len(ARM_JOINTS))
        return self._offset


def _state(world: World) -> list[float]:
    joints = world.joint_positions()
    return [joints[name] for name in STATE_JOINTS]


def demonstrate(
    world: World,
    expert: Expert,
    seed: int,
    noise_rad: float = 0.0,
    pictures: bool = True,
    frame_limit: int = 120,
    lead: Callable[[World, int], bool] | None = None,
) -> Demonstration:
    """Run one episode; it ends FRAMES_AFTER_SUCCESS after success or at frame_limit.

    noise_rad is the standard deviation of the disturbance of each arm joint. Without pictures
    the images are empty and the episode costs only its physics. If the lead has finished the task
    itself, the demonstration is empty and no success.
    """
    if not 0.0 <= noise_rad <= 0.1:
        raise ValueError(f'noise_rad: expected 0 to 0.1 rad, got {noise_rad}')
    disturbance = _Disturbance(seed, noise_rad)
    if lead is None:
        world.reset(seed, disturbance.start_jitter_rad)
    elif lead(world, seed):
        return Demonstration.nothing(seed)
    expert.reset()
    acts_from = 1 if lead is None else 0
    joints = world.joint_positions()
    executed = np.array([joints[name] for name in COMMAND_JOINTS])
    images, commands, states = [], [], [_state(world)]
    success_frame: int | None = None
    for frame in range(frame_limit):
        if pictures:
            images.append(world.render())
        wanted = executed.copy()
        if frame >= acts_from:
            set_points = expert.set_points()
            wanted = np.array([set_points[name] for name in COMMAND_JOINTS])
        commands.append(wanted)
        if success_frame is None and world.success():
            success_frame = frame
        if success_frame is not None and frame >= success_frame + FRAMES_AFTER_SUCCESS:
            break
        if frame == frame_limit - 1:
            break
        target = wanted.copy()
        if frame >= 1:
            target[: len(ARM_JOINTS)] += disturbance.offset(frame)
        for step in range(1, STATES_PER_FRAME + 1):
            between = executed + (target - executed) * (step / STATES_PER_FRAME)
            world.step(dict(zip(COMMAND_JOINTS, between.tolist(), strict=True)))
            states.append(_state(world))
        executed = target
    return Demonstration(
        seed=seed,
        success=success_frame is not None and world.success(),
        images=np.array(images, np.uint8),
        states=np.array(states),
        commands=np.array(commands),
    )
