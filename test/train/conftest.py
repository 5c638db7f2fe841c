# SPDX-License-Identifier: Apache-2.0
"""Training tests run on one thread and share the bag writer beside them and a small policy."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
