# SPDX-License-Identifier: Apache-2.0
"""The demo's nodes as child processes: a private ROS domain, their environment, start and end.

Each node writes to a log file of its own. Children run in sessions of their own, so that a Ctrl-C
in the terminal reaches them once, from `stop_all`: first SIGINT, then SIGKILL.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

DOMAINS = range(1, 102)  # the ports of higher ones are also given to clients on Linux
PATIENT_S, HURRIED_S = 10.0, 1.2
# How long robot and policy wait for each other; less than SILENCE_LIMIT_S of the driver.
OWED_LIMIT_S = 60.0
TAIL_LINES = 12
_SEVERE = re.compile(r'\[(?:ERROR|FATAL)\] \[[\d.]+\] \[[\w/.]+\]: (.*)')


class DemoError(RuntimeError):
    """The demo cannot go on: one line of reason, and the log lines that explain it."""

    def __init__(self, reason: str, log: Sequence[str] = ()) -> None:
        super().__init__(reason)
        self.log = tuple(log)


def share_directory() -> Path:
    """Folder of config/ and models/: the source tree this file lies in, or the installed share.

    Raises
    ------
    DemoError
        if neither holds them.

    """
    candidates = [Path(__file__).resolve().parents[3]]
    prefixes = [*os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep), sys.prefix]
    candidates += [Path(prefix) / 'share' / 'tts_policy' for prefix in prefixes if prefix]
    for candidate in candidates:
        if (candidate / 'config').is_dir():
            return candidate
    raise DemoError(f'config/: expected in one of {[str(path) for path in candidates]}, got none')


def private_domain() -> int:
    """Return a ROS domain that nobody on this machine uses.

    Raises
    ------
    DemoError
        if all are taken.

    """
    for domain in random.sample(DOMAINS, len(DOMAINS)):
        # The first participant of a domain binds this port (RTPS 9.6.1.1).
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(('', 7400 + 250 * domain + 10))
            except OSError:
                continue
            return domain
    raise DemoError(f'ROS domain: expected a free one of 1 to {DOMAINS[-1]}, got none')


def prepare_environment(share: Path, domain: int, log: Path) -> None:
    """Set what ROS reads when a node starts, here and in every child; values set are kept."""
    os.environ['ROS_DOMAIN_ID'] = str(domain)
    os.environ['ROS_AUTOMATIC_DISCOVERY_RANGE'] = 'LOCALHOST'
    profile = str(share / 'config' / 'fastdds.xml')
    for name, value in (
        ('AMENT_PREFIX_PATH', sys.prefix),
        ('FASTRTPS_DEFAULT_PROFILES_FILE', profile),  # Fast DDS 2
        ('FASTDDS_DEFAULT_PROFILES_FILE', profile),  # Fast DDS 3
        ('ROS_LOG_DIR', str(log / 'ros')),
        ('OMP_NUM_THREADS', '1'),
    ):
        os.environ.setdefault(name, value)


def child_environment() -> dict[str, str]:
    """Environment of a child process.

    The wheels of rclpy re-execute the interpreter once to set LD_LIBRARY_PATH, and a child has to
    do so again for itself. With a ROS installation there is no such marker, and its path is kept.
    """
    environment = {**os.environ, 'PYTHONUNBUFFERED': '1'}
    if environment.pop('_ROS_WHEELS_BOOTSTRAP_COMPLETE', None) is not None:
        environment.pop('LD_LIBRARY_PATH', None)
    return environment


class NodeProcess:
    """One node of the package, started as `python -m module`."""

    def __init__(
        self,
        module: str,
        parameters: Mapping[str, object],
        log: Path,
        parameter_file: Path | None = None,
    ) -> None:
        self.name = module.rpartition('.')[2]
        self._log = log
        arguments = ['--ros-args']
        if parameter_file is not None:
            arguments += ['--params-file', str(parameter_file)]
        for name, value in parameters.items():
            # rcl reads the value as YAML, of which JSON is a part.
            arguments += ['-p', f'{name}:={json.dumps(value)}']
        with log.open('w') as output:
            self._process = subprocess.Popen(
                [sys.executable, '-m', module, *arguments],
                env=child_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def check(self) -> None:
        """Raise DemoError with the reason if the process has ended."""
        if not self.running:
            raise self.failure(f'{self.name} ended with status {self._process.returncode}')

    def failure(self, what: str) -> DemoError:
        """Error with the node's own reason, the last severe line of its log, and the log's end."""
        lines = self._log.read_text(errors='replace').split('\n')
        lines = [line.rstrip() for line in lines if line.strip()]
        severe = [match[1] for line in lines if (match := _SEVERE.search(line))]
        reason = severe[-1] if severe else (lines[-1].strip() if lines else 'it wrote nothing')
        return DemoError(f'{what}: {reason}', (f'{self._log}:', *lines[-TAIL_LINES:]))

    def interrupt(self) -> None:
        """Send SIGINT, as a user would."""
        if self.running:
            self._process.send_signal(signal.SIGINT)

    def end(self, deadline_s: float) -> None:
        """Wait until `deadline_s` of the monotonic clock, then kill."""
        try:
            self._process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def stop_all(processes: Sequence[NodeProcess], grace_s: float) -> None:
    """End processes together, within grace_s and what a kill takes.

    A killed node stays in the ROS graph for some 20 s and leaves shared memory behind.
    """
    # A second Ctrl-C must not leave children behind.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for process in processes:
            process.interrupt()
        deadline_s = time.monotonic() + grace_s
        for process in processes:
            process.end(deadline_s)
    finally:
        signal.signal(signal.SIGINT, before)
