# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the evaluation's tests: a small bundle with random weights, and a worker on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tts_policy.sim  # noqa: F401  (chooses MuJoCo's renderer before anything imports it)


@pytest.fixture(scope='session')
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a bundle of one block per kind, whose pruners read the observation."""
    from tts_policy.policy.bundle import save_random_bundle
    from tts_policy.policy.encoders.cnn import CnnSpec
    from tts_policy.policy.network import NetworkSpec
    from tts_policy.policy.sampler import DIFFUSION_SAMPLERS
    from tts_policy.sim.panda import PANDA_CONTRACT

    folder = tmp_path_factory.mktemp('bundle')
    tiny = NetworkSpec(width=16, layers=1, heads=2, encoder=CnnSpec(16))
    save_random_bundle(folder, PANDA_CONTRACT, DIFFUSION_SAMPLERS, tiny)
    return folder


@pytest.fixture(scope='session')
def worker(bundle: Path) -> Iterator[Any]:
    """What a process of an evaluation does, on one other episode of Lift."""
    pytest.importorskip('robosuite', reason='robosuite is not installed')
    from tts_policy.evaluate.worker import Worker

    worker = Worker({'lift': bundle}, sequences=1)
    yield worker
    worker.close()


@pytest.fixture
def grow() -> Callable[[Path, Path, float], Path]:
    """Copy a bundle, and give its DDIM-10 pruner a table for one more sparsity."""
    import torch

    from tts_policy.policy.bundle import load_bundle, save_pruner
    from tts_policy.policy.pruner import Pruner

    def grown(bundle: Path, folder: Path, sparsity: float) -> Path:
        other = Path(shutil.copytree(bundle, folder))
        pruner = load_bundle(other).samplers['ddim10'][1]
        assert isinstance(pruner, Pruner)
        spec = replace(pruner.spec, sparsities=tuple(sorted((*pruner.spec.sparsities, sparsity))))
        more = Pruner(spec)
        with torch.no_grad():
            for table, known in zip(more.tables, spec.sparsities, strict=True):
                table.copy_(pruner.table(known) if known != sparsity else table + 1.0)
        save_pruner(other, 'ddim10', more)
        return other

    return grown
