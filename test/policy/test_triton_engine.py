# SPDX-License-Identifier: Apache-2.0
"""The persistent kernel against the eager engine, in Triton's interpreter, and its compilation."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tts_policy.policy.denoisers.transformer import TransformerDenoiser, TransformerSpec
from tts_policy.policy.engines.eager import EagerEngine, Engine
from tts_policy.policy.engines.registry import engine_maker
from tts_policy.policy.feature_cache import FeatureCache
from tts_policy.policy.plan import Plan, make_plan
from tts_policy.policy.scheduler import NoiseScheduler, SchedulerSpec
from tts_policy.policy.stopwatch import Stopwatch

# Read when Triton is imported, which other tests do where torch brings one.
if find_spec('triton') is None or os.environ.get('TRITON_INTERPRET') != '1':
    pytest.skip('no interpreted triton here (scripts/test_triton.sh)', allow_module_level=True)

SPEC = TransformerSpec(
    action_dim=3, horizon=8, obs_steps=2, obs_features=7, width=32, layers=2, heads=2
)
STEPS = 4
SCHEDULERS = {
    'ddpm': SchedulerSpec('ddpm', STEPS, STEPS),
    'ddim': SchedulerSpec('ddim', STEPS, 40, clip=0.5),
}


def random_denoiser(spec: TransformerSpec = SPEC) -> TransformerDenoiser:
    torch.manual_seed(0)
    denoiser = TransformerDenoiser(spec).eval().requires_grad_(False)
    for parameter in denoiser.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.1)
    return denoiser


class Run:
    """An engine with a cache of its own."""

    def __init__(self, scheduler: str, force: bool, dtype: torch.dtype | None = None) -> None:
        from tts_policy.policy.engines.triton_engine import TritonEngine

        noise = NoiseScheduler(SCHEDULERS[scheduler])
        self.cache = FeatureCache(SPEC, STEPS, noise.needs_noise, torch.device('cpu'))
        self.force = force
        arguments = (random_denoiser(), noise, self.cache, force)
        self.engine: Engine = (
            EagerEngine(*arguments) if dtype is None else TritonEngine(*arguments, dtype=dtype)
        )

    def tick(self, features: Tensor, logits: np.ndarray, sparsity: float) -> Tensor:
        def plan() -> Plan:
            if self.force and self.cache.tick == 0:
                # A forced step 0 has run by the time the plan is asked for, which may be late.
                assert torch.isfinite(self.cache.features[0]).all()
            valid, kinds = self.cache.rollout_valid(4), SPEC.stack.kinds
            return make_plan(logits, sparsity, valid, self.force, kinds)

        self.engine.observe(features)
        x, executed = self.engine.denoise(plan, Stopwatch())
        self.cache.commit(executed)
        return x


@pytest.mark.parametrize('scheduler', sorted(SCHEDULERS))
@pytest.mark.parametrize('force', [True, False])
@torch.inference_mode()
def test_equals_the_eager_engine_over_random_plans_and_a_reset(
    scheduler: str, force: bool
) -> None:
    runs = Run(scheduler, force), Run(scheduler, force, torch.float32)
    rng = np.random.default_rng(0)
    for episode, sparsities in enumerate([(0.0, 0.7, 0.4), (0.0, 0.75)]):
        for run in runs:
            run.cache.reset(torch.Generator().manual_seed(episode))
        for sparsity in sparsities:
            features = torch.from_numpy(rng.standard_normal((1, 2, 7), np.float32))
            logits = rng.standard_normal((STEPS, SPEC.blocks, 4), np.float32)
            expected, x = (run.tick(features, logits, sparsity) for run in runs)
            assert (x - expected).abs().max() < 1e-4


@pytest.mark.parametrize('scheduler', sorted(SCHEDULERS))
@torch.inference_mode()
def test_half_precision_weights_stay_within_two_hundredths(scheduler: str) -> None:
    runs = Run(scheduler, True), Run(scheduler, True, torch.float16)
    rng = np.random.default_rng(0)
    for run in runs:
        run.cache.reset(torch.Generator().manual_seed(0))
    for sparsity in (0.0, 0.7):
        features = torch.from_numpy(rng.standard_normal((1, 2, 7), np.float32))
        logits = rng.standard_normal((STEPS, SPEC.blocks, 4), np.float32)
        expected, x = (run.tick(features, logits, sparsity) for run in runs)
        assert 0 < (x - expected).norm() / expected.norm() < 2e-2


def test_a_cpu_without_the_interpreter_is_refused_at_setup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noise = NoiseScheduler(SCHEDULERS['ddim'])
    cache = FeatureCache(SPEC, STEPS, False, torch.device('cpu'))
    monkeypatch.delenv('TRITON_INTERPRET')
    with pytest.raises(ValueError, match=r"engine 'triton' needs a GPU, .* got cpu without"):
        engine_maker('triton')(random_denoiser(), noise, cache, True)


def test_sizes_that_the_kernel_cannot_take_are_refused() -> None:
    from tts_policy.policy.engines.triton_engine import TritonEngine

    spec = TransformerSpec(3, 8, 2, 7, width=96, layers=1, heads=2)
    noise = NoiseScheduler(SCHEDULERS['ddim'])
    cache = FeatureCache(spec, STEPS, False, torch.device('cpu'))
    with pytest.raises(ValueError, match=r'power of two.*got width 96 and heads of 48'):
        TritonEngine(random_denoiser(spec), noise, cache, True)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from tts_policy.policy.engines.triton_kernel import denoise

sizes = dict(T=10, S=3, LAYERS=8, HEADS=4, ROWS=16, D=256, ACTIONS=16, MEMORY=16)
constants = {**sizes, 'NOISY': True, 'TILE': 16, 'PROGRAMS': 64}
types = {'first': 'i32', 'last': 'i32', 'eps': 'fp32', 'scale': 'fp32', 'clip': 'fp32'}
types |= {'arrived': '*i32', 'sources': '*i64'}

def kind(name):
    if name in constants:
        return 'constexpr'
    return types.get(name, '*fp16' if name[:2] in ('w_', 'b_') else '*fp32')

names = denoise.arg_names
source = ASTSource(
    denoise,
    signature={name: kind(name) for name in names},
    constexprs={(names.index(name),): value for name, value in constants.items()},
    attrs={
        (place,): [['tt.divisibility', 16]]
        for place, name in enumerate(names)
        if kind(name)[0] == '*'
    },
)
options = {'num_warps': 8, 'launch_cooperative_grid': True}
kernel = compile(source, target=GPUTarget('cuda', 90, 32), options=options)
assert 'cubin' in kernel.asm
assert kernel.metadata.shared <= 96 * 1024, kernel.metadata.shared
"""


@pytest.mark.slow
def test_the_kernel_compiles_for_a_gpu_at_upstream_size(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}
    environment['TRITON_CACHE_DIR'] = str(tmp_path)
    script = tmp_path / 'compile_kernel.py'
    script.write_text(COMPILE)
    run = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
