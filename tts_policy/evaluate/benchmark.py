# SPDX-License-Identifier: Apache-2.0
"""A task as an evaluation sees it: episodes, and observations to compare actions on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tts_policy.policy.bundle import Bundle, BundleError
from tts_policy.policy.contract import PolicyContract
from tts_policy.policy.policy import TestTimeSparsePolicy
from tts_policy.sim.demonstration import STATES_PER_FRAME, Demonstration, demonstrate
from tts_policy.sim.episode import FRAME_NS, Robot, Timeline
from tts_policy.sim.panda import CAMERA_KEY, COMMAND_JOINTS, STATE_JOINTS
from tts_policy.sim.rollout import DeceivedRobot, Rollout, run_episode
from tts_policy.sim.tasks.pusht import AGENT_AXES, BLOCK_AXES, PushTWorld, run_pusht
from tts_policy.sim.tasks.registry import TASKS, Task
from tts_policy.sim.world import World

# Beside those of demonstrations, evaluation and demo.
EXPERT_SEED = 900_000
Window = dict[str, NDArray[Any]]


class Benchmark(ABC):
    """Worlds are built when first needed; one instance is used by one process.

    observed, commanded: names a policy can observe and command; bundle: evaluated by default.
    """

    observed: tuple[str, ...]
    commanded: tuple[str, ...]
    bundle: Path

    def check(self, contract: PolicyContract) -> None:
        """Raise BundleError if the task cannot be run with a policy of this contract."""
        for what, names, known in (
            ('observation', contract.observation.joints, self.observed),
            ('action', contract.action.joints, self.commanded),
        ):
            unknown = sorted(set(names) - set(known))
            if unknown:
                raise BundleError(f'{what} joints of {list(known)} expected, got {unknown[:5]}')

    @abstractmethod
    def run(
        self, policy: TestTimeSparsePolicy, seed: int, sparsity: float, execute: int, blind: bool
    ) -> Rollout:
        """Run one episode, `execute` actions of every chunk; blind: the camera shows another."""

    def close(self) -> None:  # noqa: B027  (most have nothing to free)
        """Free what the worlds hold outside of Python; they can be used on."""

    @abstractmethod
    def windows(self, bundle: Bundle, episodes: int, stride: int) -> list[list[Window]]:
        """Windows of the ticks of other episodes than those evaluated, `stride` frames apart."""


class PandaBenchmark(Benchmark):
    """A task of the simulated Panda; the observations are those of its scripted expert."""

    observed, commanded = STATE_JOINTS, COMMAND_JOINTS

    def __init__(self, task: Task) -> None:
        self.bundle = Path(f'models/panda_{task.name}')
        self._task = task
        self._robot: World | None = None
        self._deceived: DeceivedRobot | None = None
        self._worlds: list[World] = []
        self._shown: list[Demonstration] = []

    def run(
        self, policy: TestTimeSparsePolicy, seed: int, sparsity: float, execute: int, blind: bool
    ) -> Rollout:
        """Run one episode on the timeline of the robot node."""
        timeline = Timeline(execute * FRAME_NS, self._task.frame_limit * FRAME_NS)
        return run_episode(policy, self._world(blind), seed, sparsity, timeline)

    def _world(self, blind: bool) -> Robot:
        if blind:
            if self._deceived is None:
                self._deceived = DeceivedRobot(self._built(), self._built())
            return self._deceived
        if self._robot is None:
            self._robot = self._built()
        return self._robot

    def _built(self) -> World:
        self._worlds.append(self._task.world())
        return self._worlds[-1]

    def close(self) -> None:
        """Free the renderers of the worlds."""
        for world in self._worlds:
            world.close()

    def windows(self, bundle: Bundle, episodes: int, stride: int) -> list[list[Window]]:
        """Windows of expert episodes."""
        contract = bundle.network.contract
        columns = [STATE_JOINTS.index(name) for name in contract.observation.joints]
        back = contract.observation.steps
        found: list[list[Window]] = []
        for shown in self._demonstrations(episodes):
            images, joints = shown.images, shown.states[::STATES_PER_FRAME][:, columns]
            found.append(
                [
                    {CAMERA_KEY: images[end - back : end], 'joints': joints[end - back : end]}
                    for end in range(back, len(shown) + 1, stride)
                ]
            )
        return found

    def _demonstrations(self, count: int) -> list[Demonstration]:
        if not self._shown:
            robot, limit = self._task.world(), self._task.frame_limit
            expert, seeds = self._task.expert(robot), range(EXPERT_SEED, EXPERT_SEED + count)
            self._shown = [demonstrate(robot, expert, s, frame_limit=limit) for s in seeds]
            robot.close()
        return self._shown


class PushTBenchmark(Benchmark):
    """Push-T from key points of the block; its score is the largest reward of the episode.

    There is no scripted expert: the observations are those of the policy itself, run dense.
    """

    observed, commanded = (*BLOCK_AXES, *AGENT_AXES), AGENT_AXES
    bundle = Path('models/pusht_lowdim')

    def __init__(self) -> None:
        self._made: PushTWorld | None = None
        self._shown: list[NDArray[np.float64]] = []

    def check(self, contract: PolicyContract) -> None:
        """Raise BundleError for other names, cameras, and without gym-pusht."""
        super().check(contract)
        if contract.observation.cameras:
            raise BundleError('a policy without cameras expected for pusht')
        try:
            import gym_pusht  # noqa: F401
        except ImportError:
            raise BundleError('pusht: gym-pusht expected, see requirements/pusht.txt') from None

    @property
    def _world(self) -> PushTWorld:
        if self._made is None:
            self._made = PushTWorld()
        return self._made

    def run(
        self, policy: TestTimeSparsePolicy, seed: int, sparsity: float, execute: int, blind: bool
    ) -> Rollout:
        """Run one episode; it ends with the block on its outline, or after EPISODE_FRAMES."""
        if blind:
            raise BundleError('pusht: a camera that deceives expected, there is none')
        return run_pusht(policy, self._world, seed, sparsity, execute)[0]

    def windows(self, bundle: Bundle, episodes: int, stride: int) -> list[list[Window]]:
        """Windows of dense episodes of the bundle's first sampler."""
        contract = bundle.network.contract
        back = contract.observation.steps
        if not self._shown:
            policy = TestTimeSparsePolicy(bundle, bundle.default_sampler)
            execute = contract.action.execute
            self._shown = [
                run_pusht(policy, self._world, EXPERT_SEED + n, 0.0, execute)[1]
                for n in range(episodes)
            ]
        return [
            [{'joints': joints[end - back : end]} for end in range(back, len(joints) + 1, stride)]
            for joints in self._shown
        ]


BENCHMARKS: dict[str, Callable[[], Benchmark]] = {
    **{name: partial(PandaBenchmark, task) for name, task in TASKS.items()},
    'pusht': PushTBenchmark,
}


def benchmark_named(name: str) -> Benchmark:
    """A new benchmark of that name; raises ValueError naming those there are."""
    if name not in BENCHMARKS:
        raise ValueError(f'task must be one of {list(BENCHMARKS)}, got {name!r}')
    return BENCHMARKS[name]()
