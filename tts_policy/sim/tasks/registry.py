# SPDX-License-Identifier: Apache-2.0
"""The tasks by name: world, scripted expert and time limit of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tts_policy.sim.expert import Expert
from tts_policy.sim.tasks.can import CanExpert, CanWorld
from tts_policy.sim.tasks.lift import LiftExpert, LiftWorld
from tts_policy.sim.tasks.stack import StackExpert, StackWorld
from tts_policy.sim.world import World


@dataclass(frozen=True)
class Task:
    """A task; `frame_limit` frames are the time limit of demonstration and episode."""

    name: str
    world: Callable[[], World]
    make_expert: Callable[[Any], Expert]
    frame_limit: int

    def expert(self, world: World) -> Expert:
        """Scripted expert of a world that this task made."""
        return self.make_expert(world)


TASKS = {
    task.name: task
    for task in (
        Task('lift', LiftWorld, LiftExpert, 120),
        Task('stack', StackWorld, StackExpert, 240),
        Task('can', CanWorld, CanExpert, 240),
    )
}


def task_named(name: str) -> Task:
    """Task of that name; raises ValueError naming those there are."""
    if name not in TASKS:
        raise ValueError(f'task must be one of {list(TASKS)}, got {name!r}')
    return TASKS[name]
