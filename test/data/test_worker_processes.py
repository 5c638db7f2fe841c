# SPDX-License-Identifier: Apache-2.0
"""Processes for independent jobs: what becomes of them when something goes wrong."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from concurrent.futures import as_completed

import pytest

from tts_policy.data.worker_processes import worker_processes


@pytest.mark.fault
def test_a_killed_worker_ends_the_work_with_the_reason() -> None:
    with (
        pytest.raises(ChildProcessError, match=r'a worker process died.* run the same command'),
        worker_processes(2, time.sleep, (0,)) as workers,
    ):
        jobs = [workers.submit(time.sleep, 60), workers.submit(os._exit, 9)]
        for job in as_completed(jobs):
            job.result()
    assert not multiprocessing.active_children()


@pytest.mark.fault
def test_a_worker_that_cannot_start_ends_the_work_with_the_reason() -> None:
    with pytest.raises(ChildProcessError), worker_processes(1, int, ('x',)) as workers:
        workers.submit(time.sleep, 0).result()


def test_an_interrupt_ends_the_workers_where_they_are() -> None:
    began_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt), worker_processes(1, time.sleep, (0,)) as workers:
        assert workers.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN
        jobs = [workers.submit(time.sleep, 600) for _ in range(3)]
        raise KeyboardInterrupt
    assert time.monotonic() - began_s < 300
    assert not multiprocessing.active_children()
    assert all(job.cancelled() or job.exception() for job in jobs)
