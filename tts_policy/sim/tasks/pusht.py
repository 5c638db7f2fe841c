# SPDX-License-Identifier: Apache-2.0
"""Push-T: a T-shaped block is to be pushed onto its outline by a round finger.

The environment is gym-pusht's, an optional requirement (requirements/pusht.txt); the score of an
episode is the largest reward in it, as in Diffusion Policy.
`python -m tts_policy.sim.tasks.pusht FILE` replays the demonstrations of a replay buffer and
prints their mean score.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from tts_policy.data.replay_buffer import ReplayBufferError, load_replay_buffer
from tts_policy.sim.rollout import Rollout
from tts_policy.sim.task import EXPERT_SEED, Task, TaskError, Window

if TYPE_CHECKING:
    from tts_policy.policy.bundle import Bundle
    from tts_policy.policy.contract import PolicyContract
    from tts_policy.policy.policy import TestTimeSparsePolicy

AGENT_AXES = ('agent_x', 'agent_y')
FRAME_S = 0.1
EPISODE_FRAMES = 300
# Key points of the block in its own frame, as Diffusion Policy's data set observes them: recovered
# from states and key points of that data set by least squares, to 0.03 pixels.
BLOCK_POINTS = np.array(
    [
        [9.27, 90.04],
        [-60.98, -1.19],
        [60.91, -1.39],
        [-0.27, 25.54],
        [-14.07, 122.82],
        [39.00, 32.86],
        [-39.97, 32.73],
        [-16.82, 62.86],
        [23.54, -1.70],
    ]
)
BLOCK_AXES = tuple(f'block{n}_{axis}' for n in range(len(BLOCK_POINTS)) for axis in 'xy')


class PushTWorld:
    """One Push-T environment; lengths in its pixels of 512, angles in rad."""

    def __init__(self) -> None:
        """Build the environment. Raises ImportError without gym-pusht."""
        from gym_pusht.envs.pusht import PushTEnv

        self._environment = PushTEnv(obs_type='state', render_mode='rgb_array')
        self.score = 0.0

    def reset(self, seed: int) -> None:
        """Start an episode with finger and block where `seed` puts them."""
        self._environment.reset(seed=seed)
        self.score = 0.0

    def reset_to(self, state: NDArray[np.floating]) -> None:
        """Start an episode from a recorded state: finger x, y, block x, y, block angle.

        The block turns about its centre of mass, so that its angle has to be set before its
        position; gym-pusht's own reset does it the other way round.
        """
        self._environment.reset(seed=0)
        x, y, block_x, block_y, angle = (float(value) for value in state)
        self._environment.agent.position = (x, y)
        self._environment.block.angle = angle
        self._environment.block.position = (block_x, block_y)
        self._environment.space.step(self._environment.dt)
        self.score = 0.0

    def state(self) -> NDArray[np.float64]:
        """Finger x, y, block x, y, block angle: for tests and replay, no policy sees it."""
        return np.asarray(self._environment.get_obs(), np.float64)

    def agent(self) -> NDArray[np.float64]:
        """Position of the finger [2]."""
        return self.state()[:2]

    def positions(self) -> dict[str, float]:
        """Key points of the block and position of the finger, by the names of their axes."""
        x, y, *block, angle = self.state()
        cos, sin = np.cos(angle), np.sin(angle)
        points = BLOCK_POINTS @ np.array([[cos, sin], [-sin, cos]]) + block
        return dict(zip((*BLOCK_AXES, *AGENT_AXES), (*points.flatten(), x, y), strict=True))

    def render(self) -> NDArray[np.uint8]:
        """Return what the camera sees: uint8 [96, 96, 3] RGB."""
        return np.asarray(self._environment._render(visualize=False), np.uint8)

    def step(self, target: NDArray[np.floating]) -> float:
        """Move the finger towards `target` [2] for FRAME_S; returns the reward in [0, 1]."""
        _, reward, *_ = self._environment.step(np.asarray(target, np.float64))
        self.score = max(self.score, float(reward))
        return float(reward)


def replay(world: PushTWorld, state: NDArray[np.floating], actions: NDArray[np.floating]) -> float:
    """Score of the recorded actions [F, 2] from the recorded state [5]."""
    world.reset_to(state)
    for action in actions:
        world.step(action)
    return world.score


class PushTTask(Task):
    """Push-T from key points of the block; its score is the largest reward of the episode.

    There is no scripted expert: the observations are those of the policy itself, run dense.
    """

    def __init__(self) -> None:
        super().__init__('pusht', (*BLOCK_AXES, *AGENT_AXES), AGENT_AXES, 'pusht')
        self._world: PushTWorld | None = None
        self._shown: list[NDArray[np.float64]] = []

    def check(self, contract: PolicyContract) -> None:
        """Raise TaskError for other names, cameras, and without gym-pusht."""
        super().check(contract)
        if contract.observation.cameras:
            keys = [camera.key for camera in contract.observation.cameras]
            raise TaskError(f'pusht: expected a policy without cameras, got {keys}')
        if find_spec('gym_pusht') is None:
            raise TaskError('pusht: expected gym-pusht (requirements/pusht.txt), got none')

    def run(
        self, policy: TestTimeSparsePolicy, seed: int, sparsity: float, execute: int, blind: bool
    ) -> Rollout:
        """Run one episode; it ends with the block on its outline, or after EPISODE_FRAMES."""
        if blind:
            raise TaskError('pusht: expected an episode that sees, got blind and no camera')
        return self._episode(policy, seed, sparsity, execute)[0]

    def windows(self, bundle: Bundle, episodes: int, stride: int) -> list[list[Window]]:
        """Windows of dense episodes of the bundle's default sampler."""
        from tts_policy.policy.policy import TestTimeSparsePolicy

        contract = bundle.network.contract
        back = contract.observation.steps
        if not self._shown:
            policy = TestTimeSparsePolicy(bundle, bundle.default_sampler)
            seeds = range(EXPERT_SEED, EXPERT_SEED + episodes)
            execute = contract.action.execute
            self._shown = [self._episode(policy, seed, 0.0, execute)[1] for seed in seeds]
        return [
            [{'joints': joints[end - back : end]} for end in range(back, len(joints) + 1, stride)]
            for joints in self._shown
        ]

    def _episode(
        self, policy: TestTimeSparsePolicy, seed: int, sparsity: float, execute: int
    ) -> tuple[Rollout, NDArray[np.float64]]:
        """Episode of `seed`, and what was observed [F, J]; the first frame is seen To times.

        Every action of a chunk is the finger's target for one frame.
        """
        if self._world is None:
            self._world = PushTWorld()
        world, observation = self._world, policy.contract.observation
        policy.reset(seed)
        world.reset(seed)

        def observe() -> list[float]:
            positions = world.positions()
            return [positions[name] for name in observation.joints]

        order = [policy.contract.action.joints.index(axis) for axis in AGENT_AXES]
        rollout, seen = Rollout(seed), [observe()] * observation.steps
        frames = 0
        while frames < EPISODE_FRAMES and not rollout.success:
            chunk = policy.act({'joints': np.array(seen[-observation.steps :])}, sparsity)
            rollout.chunks.append(chunk)
            for target in chunk.actions[: min(execute, EPISODE_FRAMES - frames)]:
                world.step(target[order])
                seen.append(observe())
                frames += 1
                rollout.success = world.score >= 1.0
                if rollout.success:
                    break
        rollout.duration_s, rollout.score = frames * FRAME_S, world.score
        return rollout, np.array(seen)


TASK = PushTTask()


def main(arguments: list[str] | None = None) -> int:
    """Replay demonstrations; returns the exit status."""
    parser = argparse.ArgumentParser(prog='tts_policy.sim.tasks.pusht')
    parser.add_argument('file', type=Path, help='replay buffer, for instance pusht_*.zarr.zip')
    parser.add_argument('--episodes', type=int, help='only the first so many')
    args = parser.parse_args(arguments)
    try:
        demonstrations = load_replay_buffer(args.file, ('state', 'action'))
        world = PushTWorld()
    except (ReplayBufferError, ImportError) as error:
        print(f'pusht: {error}', file=sys.stderr)
        return 2
    count = min(args.episodes or len(demonstrations), len(demonstrations))
    scores = [
        replay(world, episode['state'][0], episode['action'])
        for episode in map(demonstrations.episode, tqdm(range(count), unit='episode'))
    ]
    print(f'{count} demonstrations replay to a mean score of {np.mean(scores):.4f}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
