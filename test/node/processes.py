# SPDX-License-Identifier: Apache-2.0
"""Child processes of the tests: started in the test run's ROS domain, stopped with SIGINT."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

REPOSITORY = Path(__file__).resolve().parent.parent.parent
# Limits are those of a quiet machine; beside other work everything may take this much longer.
BUSY_FACTOR = 6
# Everything that is told to end does so within this time.
END_LIMIT_S = 2.0


def child_environment(**extra: str) -> dict[str, str]:
    """Return the environment for a ROS process started by a test.

    The wheels of rclpy re-execute the interpreter once to set LD_LIBRARY_PATH; a child must do so
    again for itself.
    """
    environment = {**os.environ, **extra, 'PYTHONUNBUFFERED': '1'}
    environment.pop('_ROS_WHEELS_BOOTSTRAP_COMPLETE', None)
    paths = [str(REPOSITORY), extra.get('PYTHONPATH'), os.environ.get('PYTHONPATH')]
    environment['PYTHONPATH'] = os.pathsep.join(filter(None, paths))
    return environment


class RosProcess:
    """A module run as a child process; its output is collected line by line."""

    def __init__(self, module: str, *arguments: str, **environment: str) -> None:
        self.lines: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, '-m', module, *arguments],
            env=child_environment(**environment),
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A SIGINT to the test run must not reach the child before its fixture stops it.
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        self.lines.extend(line.rstrip() for line in iter(self._next_line, ''))

    def _next_line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    @property
    def output(self) -> str:
        """Everything it wrote so far."""
        return '\n'.join(self.lines)

    @property
    def running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def wait(self, timeout_s: float) -> int:
        """Return the exit status; raises subprocess.TimeoutExpired."""
        status = self._process.wait(timeout_s)
        self._reader.join(timeout_s)
        return status

    def stop(self, timeout_s: float = BUSY_FACTOR * 10.0) -> int:
        """End it with SIGINT, and with SIGKILL if that does not help."""
        if self.running:
            self.send(signal.SIGINT)
        try:
            return self.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL)
            return self.wait(timeout_s)


def wait_until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Return the first true value of the condition; fail the test after the timeout."""
    end_s = time.monotonic() + BUSY_FACTOR * timeout_s
    while time.monotonic() < end_s:
        value = condition()
        if value:
            return value
        time.sleep(0.005)
    pytest.fail(f'not within {BUSY_FACTOR * timeout_s} s: {what}')
