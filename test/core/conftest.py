# SPDX-License-Identifier: Apache-2.0
"""A small contract and random policies that the core tests share."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tts_policy.core.bundle import save_random_bundle
from tts_policy.core.contract import ActionSpec, CameraSpec, ObservationSpec, PolicyContract
from tts_policy.core.network import NetworkSpec
from tts_policy.core.sampler import SamplerSpec
from tts_policy.core.scheduler import SchedulerSpec

sys.path.insert(0, str(Path(__file__).parent))  # recording.py

CONTRACT = PolicyContract(
    ObservationSpec((CameraSpec('camera', 32, 48),), ('a', 'b', 'c'), steps=2, period_s=0.05),
    ActionSpec(('a', 'b', 'c'), horizon=8, execute=4, offset_steps=1),
)
NETWORK = NetworkSpec(width=32, layers=2, heads=2, camera_channels=16, train_steps=20)
SAMPLERS = {
    'ddim5': SamplerSpec(SchedulerSpec('ddim', 5, 20), False, recommended_sparsity=0.6),
    'ddpm20': SamplerSpec(SchedulerSpec('ddpm', 20, 20), True, recommended_sparsity=0.9),
}


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
