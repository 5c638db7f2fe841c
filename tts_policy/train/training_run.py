# SPDX-License-Identifier: Apache-2.0
"""What the training commands share: arguments, checkpoint, log, progress and interruption."""

from __future__ import annotations

import argparse
import csv
import hashlib
import shlex
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from tts_policy.data.demonstrations import add_demonstration_arguments
from tts_policy.policy.state_hash import take_in

INTERRUPTED = 130
_CHECKPOINT = 'checkpoint.pt'


def training_parser(
    command: str, description: str | None, threads: int
) -> argparse.ArgumentParser:
    """Return a parser with the arguments of every training command."""
    first_line = (description or '').split('\n')[0]
    parser = argparse.ArgumentParser(prog=command, description=first_line)
    add_demonstration_arguments(parser)
    parser.add_argument(
        '--out', type=Path, required=True, help='folder of checkpoints, log and result'
    )
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--threads', type=int, default=threads, help='torch threads')
    return parser


def write_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint; it replaces the last one only when it is complete."""
    partial = (folder / _CHECKPOINT).with_suffix('.tmp')
    torch.save(state, partial)
    partial.replace(folder / _CHECKPOINT)


def read_checkpoint(folder: Path) -> Any:
    """Return the state of the checkpoint in a folder, None if there is none."""
    path = folder / _CHECKPOINT
    return torch.load(path, weights_only=True) if path.exists() else None


def digest(module: nn.Module, *about: Any) -> str:
    """Return the SHA-256 of a module's state and of plain containers that describe it."""
    digested = hashlib.sha256(repr(about).encode())
    take_in(digested, module.state_dict())
    return digested.hexdigest()


def check_settings(out: Path, began: Mapping[str, str], settings: Mapping[str, str]) -> None:
    """Compare the settings of a run with those that it began with.

    Raises
    ------
    ValueError
        naming the first that differs, or that a checkpoint of an earlier version lacks.

    """
    for name, value in settings.items():
        first = began.get(name, 'an unknown value')
        if first != value:
            raise ValueError(
                f'{out}: {name}: expected {first}, with which this run began, got {value}; '
                'another --out begins a new run'
            )


class RunLog:
    """The file log.csv of a run, with its progress bar; to be used as a context manager.

    A run that is continued appends to the file.
    """

    def __init__(self, out: Path, columns: Sequence[str], first: int, total: int) -> None:
        self._path, self._columns = out / 'log.csv', columns
        self._first, self._total = first, total

    def __enter__(self) -> RunLog:
        """Open the file, write its header if it is new, and show the bar."""
        new = not self._path.exists()
        self._file = self._path.open('a', newline='')
        self._writer = csv.writer(self._file)
        if new:
            self._writer.writerow(self._columns)
        self._started = time.monotonic()
        self._bar = tqdm(total=self._total, initial=self._first, unit='step', mininterval=5)
        return self

    def __exit__(self, *_: object) -> None:
        """Close file and bar."""
        self._bar.close()
        self._file.close()

    @property
    def seconds(self) -> int:
        """Seconds since the run was begun or continued."""
        return round(time.monotonic() - self._started)

    def write(self, *values: object) -> None:
        """Append a row."""
        self._writer.writerow(values)
        self._file.flush()

    def advance(self, **shown: object) -> None:
        """Count a step on the bar; show values beside it where given."""
        self._bar.update()
        if shown:
            self._bar.set_postfix(shown)


class StopRequest:
    """While it is entered, the first SIGINT requests a stop, and a second one interrupts as usual.

    A step that is interrupted has drawn random numbers and perhaps changed weights, so that no
    checkpoint made after it could continue correctly. To be entered by the main thread.
    """

    def __init__(self) -> None:
        self.made = False

    def __enter__(self) -> StopRequest:
        """Begin to listen; if SIGINT is ignored, it stays so."""
        self._previous: Any = signal.getsignal(signal.SIGINT)
        if callable(self._previous):
            signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the previous handler of SIGINT."""
        if callable(self._previous):
            signal.signal(signal.SIGINT, self._previous)

    def _ask(self, *_: object) -> None:
        self.made = True
        signal.signal(signal.SIGINT, self._previous)


def report_interruption(where: str) -> int:
    """Print where a run was interrupted and how to continue it; return the exit status."""
    print(f'interrupted {where}; next: run the same command again to continue')  # noqa: T201
    return INTERRUPTED


def command_on(args: argparse.Namespace, command: str, *words: object) -> str:
    """Return a command line that reads the same recordings in the same way."""
    line = [command, *args.demonstrations, *words, '--image-fit', args.image_fit]
    topics = [word for topic in args.topic for word in ('--topic', topic)]
    return shlex.join(str(word) for word in (*line, *topics))


def duration(seconds: float) -> str:
    """Return a duration in words, such as `3 h 20 min`."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return 'less than a minute'
    return f'{minutes} min' if minutes < 60 else f'{minutes // 60} h {minutes % 60} min'
