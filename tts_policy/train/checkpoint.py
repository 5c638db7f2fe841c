# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of trainings, and what a run must have in common with the one it continues."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tts_policy.policy.state_hash import take_in

_FILE = 'checkpoint.pt'


def write_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint; the last write wins only when whole."""
    partial = (folder / _FILE).with_suffix('.tmp')
    torch.save(state, partial)
    partial.replace(folder / _FILE)


def read_checkpoint(folder: Path) -> Any:
    """State of the checkpoint in a folder, None where there is none."""
    path = folder / _FILE
    return torch.load(path, weights_only=True) if path.exists() else None


def digest(module: nn.Module, *about: Any) -> str:
    """SHA-256 of a module's state, and of plain containers that are said about it."""
    digested = hashlib.sha256(repr(about).encode())
    take_in(digested, module.state_dict())
    return digested.hexdigest()


def check_settings(out: Path, began: Mapping[str, str], settings: Mapping[str, str]) -> None:
    """Compare the settings of a run with those that it began with.

    Raises
    ------
    ValueError
        naming the first that differs, or that a checkpoint of an earlier version does not have.

    """
    for name, value in settings.items():
        first = began.get(name, 'an unknown one')
        if first != value:
            raise ValueError(
                f'{out}: {name}: this run began with {first}, got {value}; '
                'another --out begins a new one'
            )
