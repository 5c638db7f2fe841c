# SPDX-License-Identifier: Apache-2.0
"""The latency benchmark: what it compares computes the same, and what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / 'bench'


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> object:
    """The benchmark's random model, small, on one thread."""
    monkeypatch.syspath_prepend(BENCH)
    from arms import random_model

    torch.set_num_threads(1)
    return random_model(10, 'cpu', tiny=True)


@torch.inference_mode()
def test_upstream_computes_what_the_dense_engine_computes(tiny_model: object) -> None:
    pytest.importorskip('diffusers', reason='requirements/bench.txt is not installed')
    from upstream import UpstreamSampler

    from tts_policy.core.chunk_sampler import ChunkSampler
    from tts_policy.core.stopwatch import Stopwatch

    spec, pruner = tiny_model.samplers['ddim10']
    chunks = ChunkSampler(tiny_model.denoiser, spec, pruner)
    features = tiny_model.observe()
    ours, _, _ = chunks.sample(features, 0.0, Stopwatch())
    upstream = UpstreamSampler(tiny_model.denoiser, spec.scheduler)
    theirs = upstream.sample(features, chunks.lattice.initial_noise)
    assert (ours - theirs).abs().max() < 1e-4


@torch.inference_mode()
def test_ablated_memories_give_the_eager_result(tiny_model: object) -> None:
    from ablation import AllStepsMemory, PerStepMemory, eager_with

    from tts_policy.core.chunk_sampler import ChunkSampler
    from tts_policy.core.engine import EagerEngine
    from tts_policy.core.stopwatch import Stopwatch

    spec, pruner = tiny_model.samplers['ddpm100']
    engines = (EagerEngine, eager_with(PerStepMemory), eager_with(AllStepsMemory))
    samplers = [ChunkSampler(tiny_model.denoiser, spec, pruner, engine=e) for e in engines]
    features = tiny_model.observe()
    expected, *ablated = [s.sample(features, 0.0, Stopwatch())[0] for s in samplers]
    for x in ablated:
        assert (x - expected).abs().max() < 1e-4


def test_it_writes_percentiles_and_stages_of_every_arm(tmp_path: Path) -> None:
    pytest.importorskip('diffusers', reason='requirements/bench.txt is not installed')
    file = tmp_path / 'out' / 'latency.json'
    command = [sys.executable, BENCH / 'latency.py', '--random', '--tiny', '--chunks', '2']
    subprocess.run([*command, '--json', file], check=True, capture_output=True, timeout=120)
    data = json.loads(file.read_text())
    assert data['machine']['threads'] == 1 and data['machine']['torch'] == torch.__version__
    assert {
        'upstream_dense_ddpm100',
        'dense_ddpm100',
        'sparse_ddpm100_0.95',
        'ablation_per_step_encoding_ddpm100',
        'dense_ddim10',
        'sparse_ddim10_0.80',
        'sparse_ddim16_0.80',
    } <= set(data['arms'])
    for arm in data['arms'].values():
        assert 0 < arm['p50_ms'] <= arm['p95_ms'] <= arm['p99_ms']
        assert sum(arm['stages_ms'].values()) < 3 * arm['p99_ms']
    stages = data['arms']['sparse_ddpm100_0.95']['stages_ms']
    assert {'conditional_encoder', 'pruner', 'first_step', 'masked_steps'} <= set(stages)
    assert 'denoising' in data['arms']['upstream_dense_ddpm100']['stages_ms']


def test_a_model_must_be_named() -> None:
    run = subprocess.run(
        [sys.executable, BENCH / 'latency.py'], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2 and 'one of the arguments --bundle --random' in run.stderr
