# SPDX-License-Identifier: Apache-2.0
"""The latency benchmark: what it compares computes the same, and what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCH = Path(__file__).parents[2] / 'bench'


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> object:
    """The benchmark's random model, small, on one thread."""
    monkeypatch.syspath_prepend(BENCH)
    from variants import random_model

    torch.set_num_threads(1)
    return random_model(10, 'cpu', tiny=True)


@torch.inference_mode()
def test_upstream_computes_what_the_dense_engine_computes(tiny_model: object) -> None:
    pytest.importorskip('diffusers', reason='requirements/bench.txt is not installed')
    from upstream import UpstreamSampler

    from tts_policy.policy.chunk_sampler import ChunkSampler
    from tts_policy.policy.stopwatch import Stopwatch

    spec, pruner = tiny_model.samplers['ddim10']
    chunks = ChunkSampler(tiny_model.denoiser, spec, pruner)
    features = tiny_model.observe()
    ours, _, _ = chunks.sample(features, 0.0, Stopwatch())
    upstream = UpstreamSampler(tiny_model.denoiser, spec.scheduler)
    theirs = upstream.sample(features, chunks.cache.initial_noise)
    assert (ours - theirs).abs().max() < 1e-4


@torch.inference_mode()
def test_ablated_memories_give_the_eager_result(tiny_model: object) -> None:
    from ablation import AllStepsMemory, PerStepMemory, eager_with

    from tts_policy.policy.chunk_sampler import ChunkSampler
    from tts_policy.policy.stopwatch import Stopwatch

    spec, pruner = tiny_model.samplers['ddpm100']
    engines = ('eager', eager_with(PerStepMemory), eager_with(AllStepsMemory))
    samplers = [ChunkSampler(tiny_model.denoiser, spec, pruner, engine=e) for e in engines]
    features = tiny_model.observe()
    expected, *ablated = [s.sample(features, 0.0, Stopwatch())[0] for s in samplers]
    for x in ablated:
        assert (x - expected).abs().max() < 1e-4


@torch.inference_mode()
def test_other_ways_to_sample_densely_compute_the_same(tiny_model: object) -> None:
    from dense_loops import DenseSampler, captured_dense, compiled_dense

    from tts_policy.policy.chunk_sampler import ChunkSampler
    from tts_policy.policy.stopwatch import Stopwatch

    spec, pruner = tiny_model.samplers['ddim10']
    chunks = ChunkSampler(tiny_model.denoiser, spec, pruner)
    features = tiny_model.observe()
    expected = chunks.sample(features, 0.0, Stopwatch())[0]
    dense = DenseSampler(tiny_model.denoiser, spec)
    captured = captured_dense(tiny_model.denoiser, spec)
    compiled = compiled_dense(tiny_model.denoiser, spec)
    with torch.compiler.set_stance('force_eager'):
        by_step = compiled(features)
    for x in (dense.sample(features), captured(features), by_step):
        assert (x - expected).abs().max() < 1e-4


def test_it_writes_percentiles_and_stages_of_every_variant(tmp_path: Path) -> None:
    pytest.importorskip('diffusers', reason='requirements/bench.txt is not installed')
    file = tmp_path / 'out' / 'latency.json'
    command = [sys.executable, BENCH / 'latency.py', '--random', '--tiny', '--chunks', '2']
    command += ['--trace', tmp_path / 'trace']
    subprocess.run([*command, '--json', file], check=True, capture_output=True, timeout=120)
    data = json.loads(file.read_text())
    assert data['machine']['threads'] == 1 and data['machine']['torch'] == torch.__version__
    assert {
        'upstream_dense_ddpm100',
        'upstream_dense_ddim16',
        'upstream_dense_ddim10',
        'dense_ddpm100',
        'sparse_ddpm100_0.95',
        'ablation_per_step_encoding_ddpm100',
        'dense_ddim10',
        'sparse_ddim10_0.80',
        'sparse_ddim16_0.80',
    } <= set(data['variants'])
    for variant in data['variants'].values():
        assert 0 < variant['p50_ms'] <= variant['p95_ms'] <= variant['p99_ms']
        assert sum(variant['stages_ms'].values()) < 3 * variant['p99_ms']
    stages = data['variants']['sparse_ddpm100_0.95']['stages_ms']
    assert {'conditional_encoder', 'pruner', 'first_step', 'masked_steps'} <= set(stages)
    for name in ('plan_ready_ms', 'scheduler_alone_ms', 'first_tick_ms'):
        assert data['variants']['sparse_ddim10_0.80'][name] > 0
        assert name not in data['variants']['upstream_dense_ddim10']
    ablated = data['variants']['ablation_folded_time_tokens_ddpm100']['stages_ms']
    assert {'first_step', 'masked_steps'} <= set(ablated)
    timeline = json.loads((tmp_path / 'trace' / 'sparse_ddim10_0.80.json').read_text())
    assert timeline['traceEvents']
    assert 'denoising' in data['variants']['upstream_dense_ddpm100']['stages_ms']


def test_every_engine_is_checked_against_the_eager_one(tmp_path: Path) -> None:
    command = [sys.executable, BENCH / 'gpu_check.py', '--tiny', '--json', tmp_path / 'check.json']
    run = subprocess.run([*command, '--device', 'cpu'], capture_output=True, timeout=300)
    rows = {row['name']: row for row in json.loads((tmp_path / 'check.json').read_text())['rows']}
    assert run.returncode == 0
    assert {'eager ddim10', 'packed ddim10', 'packed ddpm100 late plan'} <= set(rows)
    assert {'packed policy ddim10', 'packed policy ddpm100'} <= set(rows)
    assert all(row['error'] <= row['tolerance'] for row in rows.values())
    assert rows['packed ddim10']['error'] > 0


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_every_engine_is_right_on_the_gpu(tmp_path: Path) -> None:
    command = [sys.executable, BENCH / 'gpu_check.py', '--json', tmp_path / 'check.json']
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_an_engine_that_takes_too_long_is_a_line_of_the_report(tmp_path: Path) -> None:
    command = [sys.executable, BENCH / 'gpu_check.py', '--tiny', '--device', 'cpu']
    command += ['--limit', '0.1', '--json', tmp_path / 'check.json']
    run = subprocess.run(command, capture_output=True, timeout=120)
    rows = json.loads((tmp_path / 'check.json').read_text())['rows']
    assert run.returncode == 1
    assert [(row['name'], row['ok'], row['reason']) for row in rows] == [
        ('eager', False, 'it took longer than 0.1 s'),
        ('packed', False, 'it took longer than 0.1 s'),
    ]


def test_chunks_that_are_no_numbers_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    from gpu_check import _row

    good, bad = np.zeros((2, 3)), np.full((2, 3), np.nan)
    assert _row('ddim10', 'cuda', [good, good], [good, good])['ok']
    assert not _row('ddim10', 'cuda', [good, bad], [good, good])['ok']
    assert not _row('ddim10', 'cuda', [bad, good], [good, good])['ok']


@torch.inference_mode()
@pytest.mark.parametrize('memory', ['PerStepMemory', 'AllStepsMemory'])
def test_ablated_memories_live_where_the_denoiser_does(tiny_model: object, memory: str) -> None:
    import ablation

    # Where there is no GPU, the meta device shows what was left on the CPU.
    denoiser = tiny_model.denoiser.to('meta')
    made = getattr(ablation, memory)(denoiser, [3.0, 1.0])
    made.encode(tiny_model.observe().to('meta'))
    assert made.keys_values(1, 0).keys.device.type == 'meta'


def test_variants_that_are_not_asked_for_are_never_set_up(tiny_model: object) -> None:
    from latency import make_chunks

    variants = make_chunks(tiny_model, 'sparse_ddim16')
    assert list(variants) == ['sparse_ddim16_0.80']
    from variants import declare_variants

    assert len(declare_variants(tiny_model)) > 5


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
@pytest.mark.parametrize('command', ['gpu_check', 'latency'])
def test_a_missing_gpu_is_one_line(command: str) -> None:
    arguments = ['--random', '--device', 'cuda'] if command == 'latency' else []
    run = subprocess.run(
        [sys.executable, BENCH / f'{command}.py', *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (
        run.returncode == 2
        and run.stderr == f'{command}: device: expected a CUDA device, got none\n'
    )


def test_a_model_must_be_named() -> None:
    run = subprocess.run(
        [sys.executable, BENCH / 'latency.py'], capture_output=True, text=True, check=False
    )
    assert run.returncode == 2 and 'one of the arguments --bundle --random' in run.stderr
