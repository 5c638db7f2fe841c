# SPDX-License-Identifier: Apache-2.0
"""Closed-loop episodes of a policy in the simulated world, in one process and without topics.

Timeline, controller and trajectory are those of the robot node in lockstep and of the policy
node, so an episode here and over ROS topics is the same for the same seeds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tts_policy.control.trajectory import plan_trajectory
from tts_policy.sim.episode import Episode, Robot, Timeline
from tts_policy.sim.panda import CAMERA_KEY, FRAME_NS
from tts_policy.sim.trajectory_player import TrajectoryPoint

if TYPE_CHECKING:
    from tts_policy.policy.contract import PolicyContract
    from tts_policy.policy.policy import Chunk, TestTimeSparsePolicy

OTHER_EPISODE = 500_000


class DeceivedRobot:
    """A robot whose camera shows another episode: same motion of the arm, other object poses.

    The control that tells whether a policy looks: with this camera it must fail.
    """

    def __init__(self, real: Robot, shown: Robot) -> None:
        """Two worlds of the same task, of which one acts and one is seen."""
        self.real, self.shown = real, shown
        self.joint_positions = real.joint_positions
        self.success = real.success
        self.render = shown.render

    def reset(self, seed: int, start_jitter_rad: float = 0.0) -> None:
        """Reset the real world by `seed` and the one shown by another seed."""
        self.shown.reset(seed + OTHER_EPISODE, start_jitter_rad)
        self.real.reset(seed, start_jitter_rad)

    def step(self, set_points: Mapping[str, float]) -> None:
        """Advance both worlds with the same set-points."""
        self.shown.step(set_points)
        self.real.step(set_points)


@dataclass
class Rollout:
    """What one episode showed; chunks in the order of their ticks, a score where there is one."""

    seed: int
    success: bool = False
    duration_s: float = 0.0
    score: float | None = None
    chunks: list[Chunk] = field(default_factory=list)
    frames: list[NDArray[np.uint8]] = field(default_factory=list)


def _points(chunk: Chunk, contract: PolicyContract, stamp_ns: int) -> list[TrajectoryPoint]:
    period_ns = round(contract.observation.period_s * 1e9)
    action = contract.action
    trajectory = plan_trajectory(
        chunk.actions, action.joints, period_ns, action.offset_steps, stamp_ns, stamp_ns
    )
    return [
        TrajectoryPoint(int(due), position.tolist(), velocity.tolist())
        for due, position, velocity in zip(
            trajectory.times_ns, trajectory.positions, trajectory.velocities, strict=True
        )
    ]


def run_episode(
    policy: TestTimeSparsePolicy,
    world: Robot,
    seed: int,
    sparsity: float,
    timeline: Timeline | None = None,
    keep_frames: bool = False,
) -> Rollout:
    """Run one episode of `seed`; the policy's noise depends on the seed as well."""
    contract = policy.contract
    timeline = timeline or Timeline(contract.action.execute * FRAME_NS)
    policy.reset(seed)
    episode = Episode(world, seed, 0, timeline)
    rollout = Rollout(seed)
    steps = contract.observation.steps
    images: deque[NDArray[np.uint8]] = deque(maxlen=steps)
    joints: deque[list[float]] = deque(maxlen=steps)
    while episode.ended is None:
        # Drawing is what an episode takes longest for, and most frames are in no window.
        if episode.seen_at_tick(steps) or (keep_frames and episode.frame_due):
            state = world.joint_positions()
            images.append(world.render())
            joints.append([state[name] for name in contract.observation.joints])
            if keep_frames:
                rollout.frames.append(images[-1])
        if episode.tick_due:
            window = {CAMERA_KEY: np.stack(images), 'joints': np.array(joints)}
            chunk = policy.act(window, sparsity)
            rollout.chunks.append(chunk)
            points = _points(chunk, contract, episode.now_ns)
            episode.accept(contract.action.joints, points, episode.now_ns)
        episode.step()
    rollout.success, rollout.duration_s = episode.success, episode.elapsed_ns * 1e-9
    return rollout
