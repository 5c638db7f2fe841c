# SPDX-License-Identifier: Apache-2.0
"""Bag tests share the writer of recordings beside them."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
