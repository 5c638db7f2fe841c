# SPDX-License-Identifier: Apache-2.0
"""What a task is: episodes of a policy, and observations on which policies are compared.

Every file in `tasks/` defines one `TASK`, which `tts_policy.sim.tasks` registers by its name. A
task of the simulated Panda is a `PandaTask` of a world and a scripted expert; any other simulator
is a subclass of `Task`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from tts_policy.sim.demonstration import Demonstration, demonstrate
from tts_policy.sim.episode import Robot, Timeline
from tts_policy.sim.panda import (
    CAMERA_KEY,
    COMMAND_JOINTS,
    FRAME_NS,
    STATE_JOINTS,
    STATES_PER_FRAME,
)
from tts_policy.sim.rollout import DeceivedRobot, Rollout, run_episode

if TYPE_CHECKING:  # They bring torch, which the robot and the demo do without.
    from tts_policy.policy.bundle import Bundle
    from tts_policy.policy.contract import PolicyContract
    from tts_policy.policy.policy import TestTimeSparsePolicy
    from tts_policy.sim.expert import Expert
    from tts_policy.sim.world import World

# First seed of the observations; those of demonstrations, evaluation and demo are smaller.
EXPERT_SEED = 900_000
Window = dict[str, NDArray[Any]]


class TaskError(ValueError):
    """A task that cannot be run with a policy, or not on this machine."""


class Task(ABC):
    """A task by name; worlds are built when they are first needed.

    Attributes
    ----------
    observed, commanded
        names that a policy may observe and command.
    bundle
        folder of the bundle that is evaluated by default.

    """

    def __init__(
        self, name: str, observed: tuple[str, ...], commanded: tuple[str, ...], bundle: str
    ) -> None:
        self.name, self.observed, self.commanded = name, observed, commanded
        self.bundle = Path('models') / bundle

    def check(self, contract: PolicyContract) -> None:
        """Raise TaskError if the task cannot be run with a policy of this contract."""
        for what, names, known in (
            ('observation joints', contract.observation.joints, self.observed),
            ('action joints', contract.action.joints, self.commanded),
        ):
            unknown = sorted(set(names) - set(known))
            if unknown:
                raise TaskError(f'{what}: expected some of {list(known)}, got {unknown[:5]}')

    @abstractmethod
    def run(
        self, policy: TestTimeSparsePolicy, seed: int, sparsity: float, execute: int, blind: bool
    ) -> Rollout:
        """Run one episode, `execute` actions of every chunk; blind: the camera shows another."""

    @abstractmethod
    def windows(self, bundle: Bundle, episodes: int, stride: int) -> list[list[Window]]:
        """Windows of the ticks of episodes from EXPERT_SEED on, `stride` frames apart."""

    def close(self) -> None:  # noqa: B027  (most have nothing to free)
        """Free what the worlds hold outside of Python; new ones are built when needed."""


class PandaTask(Task):
    """A task of the simulated Panda, whose observations are those of its scripted expert.

    Attributes
    ----------
    world, expert
        make a world, and the expert of a world.
    frame_limit
        frames after which a demonstration or an episode ends as failed.

    """

    def __init__(
        self,
        name: str,
        world: Callable[[], World],
        expert: Callable[[Any], Expert],
        frame_limit: int,
    ) -> None:
        super().__init__(name, STATE_JOINTS, COMMAND_JOINTS, f'panda_{name}')
        self.world, self.expert, self.frame_limit = world, expert, frame_limit
        self._robots: dict[bool, Robot] = {}
        self._worlds: list[World] = []
        self._shown: list[Demonstration] = []

    def run(
        self, policy: TestTimeSparsePolicy, seed: int, sparsity: float, execute: int, blind: bool
    ) -> Rollout:
        """Run one episode on the timeline of the robot node."""
        if blind not in self._robots:
            new = self._new_world
            self._robots[blind] = DeceivedRobot(new(), new()) if blind else new()
        timeline = Timeline(execute * FRAME_NS, self.frame_limit * FRAME_NS)
        return run_episode(policy, self._robots[blind], seed, sparsity, timeline)

    def _new_world(self) -> World:
        self._worlds.append(self.world())
        return self._worlds[-1]

    def close(self) -> None:
        """Free the renderers of the worlds."""
        for world in self._worlds:
            world.close()
        self._worlds.clear()
        self._robots.clear()

    def windows(self, bundle: Bundle, episodes: int, stride: int) -> list[list[Window]]:
        """Windows of expert episodes."""
        observation = bundle.network.contract.observation
        columns = [STATE_JOINTS.index(name) for name in observation.joints]
        back = observation.steps
        if not self._shown:
            with self.world() as world:
                expert, seeds = self.expert(world), range(EXPERT_SEED, EXPERT_SEED + episodes)
                limit = self.frame_limit
                self._shown = [demonstrate(world, expert, s, frame_limit=limit) for s in seeds]
        return [
            [
                {
                    CAMERA_KEY: shown.images[end - back : end],
                    'joints': shown.states[::STATES_PER_FRAME][end - back : end, columns],
                }
                for end in range(back, len(shown) + 1, stride)
            ]
            for shown in self._shown
        ]
