# SPDX-License-Identifier: Apache-2.0
"""What the CUDA engine captures equals the eager engine bit for bit, over plans and episodes.

Without a GPU the captured functions are recorded operation by operation and replayed, which
freezes what a CUDA graph would freeze.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from engine_rig import CPU, Run, random_denoiser, random_features, random_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from recording import record

from tts_policy.policy.engines.cuda import CudaEngine
from tts_policy.policy.engines.eager import EagerEngine
from tts_policy.policy.engines.registry import find_engine


def recorded(*args: object) -> CudaEngine:
    return CudaEngine(*args, capture=record)  # type: ignore[arg-type]


def called(*args: object) -> CudaEngine:
    return CudaEngine(*args, capture=lambda function: function)  # type: ignore[arg-type]


@pytest.mark.parametrize('make', [recorded, called])
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(['transformer', 'mixing', 'dit']),
    scheduler=st.sampled_from(['ddpm', 'ddim', 'dpm_solver', 'flow']),
    force=st.booleans(),
)
@settings(max_examples=15, deadline=None)
@torch.inference_mode()
def test_equals_the_eager_engine_over_plans_held_actions_and_episodes(
    make: Callable[..., CudaEngine], seed: int, kind: str, scheduler: str, force: bool
) -> None:
    options = {'cond_layers': 1} if kind == 'mixing' else {}
    denoiser = random_denoiser(kind, **options)
    eager, cuda = (Run(m, scheduler, force, denoiser) for m in (EagerEngine, make))
    rng = np.random.default_rng(seed)
    logits = [random_logits(rng, eager.cache) for _ in range(3)]
    known = torch.from_numpy(rng.standard_normal((8, 3), np.float32)), torch.rand(8)
    # The plans of the first episode run uncaptured there, and from graphs in the second one.
    for episode in range(2):
        for run in (eager, cuda):
            run.reset(episode)
        for tick, sparsity in enumerate((0.0, 0.5, 0.8, 0.0, 0.8)):
            features, held = random_features(rng), known if tick in (2, 3) else None
            expected, x = (
                run.tick(features, logits[tick % 3], sparsity, held).clone()
                for run in (eager, cuda)
            )
            assert torch.equal(x, expected)
        assert torch.equal(cuda.cache.features, eager.cache.features)


@torch.inference_mode()
def test_a_plan_is_captured_once_between_episodes_and_the_cache_does_not_notice() -> None:
    captured = []

    def capture(function: Callable[[], None]) -> Callable[[], None]:
        captured.append(function)
        function()
        return function

    run = Run(lambda *args: CudaEngine(*args, capture=capture), 'ddim', force=False)
    rng = np.random.default_rng(0)
    logits = random_logits(rng, run.cache)
    assert len(captured) == 2  # the encoder and the dense plan
    for expected in (3, 3):
        for sparsity in (0.0, 0.6, 0.6):
            run.tick(random_features(rng), logits, sparsity)
        features = run.cache.features.clone()
        run.engine.prepare()
        assert len(captured) == expected
        assert torch.equal(run.cache.features, features)
        run.reset(1)


def test_a_machine_without_cuda_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"^engine 'cuda': expected a CUDA device, got cpu$"):
        find_engine('cuda', random_denoiser(), CPU)


def test_recording_refuses_a_function_that_waits_for_a_value() -> None:
    value = torch.zeros(1)
    with pytest.raises(AssertionError, match='the host waits'):
        record(lambda: value.add_(value.item()))


def test_a_recording_freezes_what_python_decides() -> None:
    value, count = torch.zeros(1), iter(range(1, 9))
    replay = record(lambda: value.add_(next(count)))
    replay()
    assert value.item() == 2  # a second call would have added 2 to the first 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('force', [True, False])
@torch.inference_mode()
def test_graphs_equal_the_eager_engine_on_a_gpu(force: bool) -> None:
    runs = [Run(m, 'ddpm', force, random_denoiser().cuda()) for m in (EagerEngine, CudaEngine)]
    rng = np.random.default_rng(0)
    logits = random_logits(rng, runs[0].cache)
    for episode in range(2):
        for run in runs:
            run.reset(episode)
        for sparsity in (0.0, 0.5, 0.8):
            features = random_features(rng).cuda()
            expected, x = (run.tick(features, logits, sparsity).clone() for run in runs)
            assert (x - expected).abs().max() < 1e-5
