# SPDX-License-Identifier: Apache-2.0
"""A small contract and random policies that the core tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_policy import CONTRACT, NETWORK, SAMPLERS

from tts_policy.policy.bundle import save_random_bundle


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Folder of a small random bundle with both samplers."""
    folder = tmp_path / 'bundle'
    save_random_bundle(folder, CONTRACT, SAMPLERS, NETWORK, seed=1)
    return folder


@pytest.fixture
def windows() -> list[dict[str, NDArray]]:
    """Observation windows of six consecutive ticks."""
    rng = np.random.default_rng(0)
    return [
        {
            'camera': rng.integers(0, 256, (2, 32, 48, 3), dtype=np.uint8),
            'joints': rng.standard_normal((2, 3)),
        }
        for _ in range(6)
    ]
