# SPDX-License-Identifier: Apache-2.0
"""Threads of this process."""

from __future__ import annotations

import torch


def set_threads(count: int) -> None:
    """Let torch use so many threads; raises ValueError for a number that is not positive."""
    if count < 1:
        raise ValueError(f'threads must be at least 1, got {count}')
    torch.set_num_threads(count)
