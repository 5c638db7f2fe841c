# SPDX-License-Identifier: Apache-2.0
"""The tasks by name. Every file in this folder defines one `TASK` and is found by itself."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from tts_policy.sim.task import PandaTask, Task

TASKS: dict[str, Task] = {
    task.name: task
    for task in (import_module(f'{__name__}.{file.name}').TASK for file in iter_modules(__path__))
}
PANDA_TASKS = {name: task for name, task in TASKS.items() if isinstance(task, PandaTask)}


def task_named(name: str) -> Task:
    """Task of that name; raises ValueError naming those there are."""
    if name not in TASKS:
        raise ValueError(f'task: expected one of {list(TASKS)}, got {name!r}')
    return TASKS[name]


def panda_task(name: str) -> PandaTask:
    """Task of the simulated Panda of that name; raises ValueError naming those there are."""
    if name not in PANDA_TASKS:
        raise ValueError(f'task: expected one of {list(PANDA_TASKS)}, got {name!r}')
    return PANDA_TASKS[name]
