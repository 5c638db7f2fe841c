# SPDX-License-Identifier: Apache-2.0
"""Training tests run on one thread and share the bag writer beside them and a small policy."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope='session')
def bags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of three recordings."""
    from bags import Recording

    folder = tmp_path_factory.mktemp('bags')
    for n in range(3):
        Recording(frames=20).write(folder / f'episode_{n}')
    return folder


@pytest.fixture(scope='session')
def bundle(bags: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle of a policy trained for six steps, in the folder of the run; to be copied."""
    from small_training import SMALL

    from tts_policy.train import train_policy

    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp('policy')
    steps = ['--steps', '6', '--encoder-steps', '2']
    assert train_policy.main([str(bags), '--out', str(out), *steps, *SMALL]) == 0
    return out / 'bundle'
