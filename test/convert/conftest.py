# SPDX-License-Identifier: Apache-2.0
"""One torch thread and a seed for every test of the conversions."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
