# SPDX-License-Identifier: Apache-2.0
"""Worker processes for jobs that are independent of each other, and how they end.

concurrent.futures notices a worker that was killed, where multiprocessing.Pool waits for ever.
Workers are spawned: a fork would take over torch's threads in whatever state they are.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any


@contextmanager
def worker_processes(
    count: int, start: Callable[..., None], setup: tuple[Any, ...]
) -> Iterator[ProcessPoolExecutor]:
    """Yield `count` processes, in each of which `start(*setup)` has run.

    On any exception, an interrupt among them, the workers are ended where they are.

    Raises
    ------
    ChildProcessError
        if a worker died, killed for its memory for instance, or could not start.

    """
    pool = ProcessPoolExecutor(
        count, multiprocessing.get_context('spawn'), _begin, (start, *setup)
    )
    try:
        yield pool
    except BrokenProcessPool:
        raise ChildProcessError(
            'a worker process died (was it killed, or short of memory?); '
            'run the same command again to go on'
        ) from None
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(start: Callable[..., None], *setup: Any) -> None:
    # An interrupt in a terminal reaches every process; the one that owns the work decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    start(*setup)
