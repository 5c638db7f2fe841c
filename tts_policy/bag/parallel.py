# SPDX-License-Identifier: Apache-2.0
"""Runs the parts of an evaluation: in this process, in several, or on a Ray cluster."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import suppress
from queue import Empty
from typing import Any

from tts_policy.bag.evaluation import (
    Arms,
    EvaluationSpec,
    Part,
    PartOutcome,
    Progress,
    evaluate_part,
)
from tts_policy.bag.reader import BagError

ENGINES = ('local', 'ray')
POLL_S = 0.2


def run_parts(
    spec: EvaluationSpec, parts: list[Part], engine: str, processes: int, progress: Progress
) -> Iterator[PartOutcome]:
    """Outcomes as they come; `progress` is told the recorded seconds that went by.

    Raises
    ------
    BagError
        if Ray is asked for and not installed.

    """
    if engine == 'ray':
        yield from _run_ray(spec, parts, progress)
    elif processes == 1:
        arms = Arms(spec)
        for part in parts:
            yield evaluate_part(arms, part, progress)
    else:
        yield from _run_pool(spec, parts, processes, progress)


class _Worker:
    """One process: policies made once, progress sent through a queue."""

    arms: Arms
    progress: Progress

    @classmethod
    def start(cls, spec: EvaluationSpec, queue: Any) -> None:
        cls.arms = Arms(spec)
        cls.progress = queue.put

    @classmethod
    def run(cls, part: Part) -> PartOutcome:
        return evaluate_part(cls.arms, part, cls.progress)


def _run_pool(
    spec: EvaluationSpec, parts: list[Part], processes: int, progress: Progress
) -> Iterator[PartOutcome]:
    context = multiprocessing.get_context('spawn')
    queue = context.Queue()
    with context.Pool(min(processes, len(parts)), _Worker.start, (spec, queue)) as pool:
        pending = [pool.apply_async(_Worker.run, (part,)) for part in parts]
        while pending:
            with suppress(Empty):
                progress(queue.get(timeout=POLL_S))
            for result in [result for result in pending if result.ready()]:
                pending.remove(result)
                yield result.get()


def _run_ray(spec: EvaluationSpec, parts: list[Part], progress: Progress) -> Iterator[PartOutcome]:
    """The folder of the results must be one that every node of the cluster sees."""
    try:
        import ray
    except ImportError:
        raise BagError('engine ray: the package ray expected, it is not installed') from None
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    remote = ray.remote(_evaluate_alone)
    pending = [remote.remote(spec, part) for part in parts]
    while pending:
        ready, pending = ray.wait(pending)
        for outcome, seconds in ray.get(ready):
            progress(seconds)
            yield outcome


def _evaluate_alone(spec: EvaluationSpec, part: Part) -> tuple[PartOutcome, float]:
    seconds: list[float] = []
    outcome = evaluate_part(Arms(spec), part, seconds.append)
    return outcome, sum(seconds)
