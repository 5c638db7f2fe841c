# SPDX-License-Identifier: Apache-2.0
"""What defines a training run: one that goes on must have it in common with what it continues."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn


def digest(module: nn.Module, *about: Any) -> str:
    """SHA-256 of a module's state, and of plain containers that are said about it."""
    digested = hashlib.sha256(repr(about).encode())
    for name, value in sorted(module.state_dict().items()):
        digested.update(f'{name} {value.dtype} {tuple(value.shape)} '.encode())
        digested.update(value.detach().cpu().contiguous().numpy().tobytes())
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
