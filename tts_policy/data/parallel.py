# SPDX-License-Identifier: Apache-2.0
"""Runs the parts of an evaluation: in this process, in several, or on a Ray cluster."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, MutableSequence
from concurrent.futures import FIRST_COMPLETED, wait

from tts_policy.data.bag_evaluation import (
    Arms,
    EvaluationSpec,
    Part,
    PartOutcome,
    Progress,
    evaluate_part,
)
from tts_policy.data.reader import BagError
from tts_policy.data.worker_processes import worker_processes

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
    ChildProcessError
        if a process died.

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
    """One process: policies made once; the seconds that went by in each part are shared."""

    arms: Arms
    seconds: MutableSequence[float]

    @classmethod
    def start(cls, spec: EvaluationSpec, seconds: MutableSequence[float]) -> None:
        cls.arms, cls.seconds = Arms(spec), seconds

    @classmethod
    def run(cls, number: int, part: Part) -> PartOutcome:
        def progress(seconds: float) -> None:
            cls.seconds[number] += seconds

        return evaluate_part(cls.arms, part, progress)


def _run_pool(
    spec: EvaluationSpec, parts: list[Part], processes: int, progress: Progress
) -> Iterator[PartOutcome]:
    # Without a lock, of which a killed process would never let go: each number has one writer.
    seconds = multiprocessing.RawArray('d', len(parts))
    shown_s = 0.0
    with worker_processes(min(processes, len(parts)), _Worker.start, (spec, seconds)) as workers:
        pending = {workers.submit(_Worker.run, *job) for job in enumerate(parts)}
        while pending:
            done, pending = wait(pending, POLL_S, FIRST_COMPLETED)
            progress(sum(seconds) - shown_s)
            shown_s = sum(seconds)
            for future in done:
                yield future.result()


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
