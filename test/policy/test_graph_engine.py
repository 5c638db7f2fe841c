# SPDX-License-Identifier: Apache-2.0
"""Captured units equal the eager engine on any plan of any stack of blocks.

Without a GPU the units are called directly, and replayed from a recording that freezes what a
captured graph would freeze.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from recording import RecordedCapture
from torch import Tensor

from tts_policy.policy.denoisers.denoiser import Denoiser
from tts_policy.policy.denoisers.dit import DiTDenoiser, DiTSpec
from tts_policy.policy.denoisers.memory_table import MemoryTable
from tts_policy.policy.denoisers.transformer import TransformerDenoiser, TransformerSpec
from tts_policy.policy.engines.capture import Capture, Capturer
from tts_policy.policy.engines.eager import EagerEngine, Engine
from tts_policy.policy.engines.graph_engine import GraphEngine
from tts_policy.policy.engines.registry import ENGINES, engine_maker
from tts_policy.policy.feature_cache import FeatureCache
from tts_policy.policy.inpainting import Inpainting
from tts_policy.policy.plan import Plan, make_plan
from tts_policy.policy.scheduler import NoiseScheduler, SchedulerSpec
from tts_policy.policy.stopwatch import Stopwatch

STEPS = 5
SIZES = {
    'action_dim': 3,
    'horizon': 8,
    'obs_steps': 2,
    'obs_features': 7,
    'width': 32,
    'layers': 2,
    'heads': 2,
}
DENOISERS = ('transformer', 'transformer_mixed', 'dit')
SCHEDULERS = {
    'ddpm': SchedulerSpec('ddpm', STEPS, STEPS, clip=0.0),
    'ddim': SchedulerSpec('ddim', STEPS, 50, clip=0.5),
    'flow': SchedulerSpec('flow', STEPS, 1, prediction='velocity', clip=0.0),
}
CPU = torch.device('cpu')
DEVICES = [
    'cpu',
    pytest.param(
        'cuda',
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device'),
        ],
    ),
]


def random_denoiser(kind: str) -> Denoiser:
    torch.manual_seed(0)
    denoiser: Denoiser
    if kind == 'dit':
        denoiser = DiTDenoiser(DiTSpec(**SIZES, time_features=16))
    else:
        denoiser = TransformerDenoiser(TransformerSpec(**SIZES, cond_layers=kind.count('mixed')))
    denoiser.eval().requires_grad_(False)
    for parameter in denoiser.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.1)
    return denoiser


class Run:
    """An engine with a cache of its own; capture: None for the eager one."""

    def __init__(
        self,
        kind: str,
        scheduler: str,
        force: bool,
        capture: Capturer | None = None,
        table: bool = False,
        device: str = 'cpu',
    ) -> None:
        self.denoiser, self.force = random_denoiser(kind).to(device), force
        self.scheduler = NoiseScheduler(SCHEDULERS[scheduler])
        noisy = self.scheduler.needs_noise
        self.cache = FeatureCache(self.denoiser.spec, STEPS, noisy, torch.device(device))
        arguments = (self.denoiser, self.scheduler, self.cache, force)
        self.engine: Engine = EagerEngine(*arguments)
        if capture is not None:
            conditioner = None
            if table:
                assert isinstance(self.denoiser, TransformerDenoiser)
                conditioner = MemoryTable(self.denoiser, self.scheduler.spec.timesteps())
            self.engine = GraphEngine(*arguments, conditioner, capture)
        self.reset(0)

    def reset(self, seed: int) -> None:
        self.cache.reset(torch.Generator().manual_seed(seed))

    def tick(
        self,
        features: Tensor,
        logits: np.ndarray,
        sparsity: float,
        known: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        def plan() -> Plan:
            if self.force and self.cache.tick == 0:
                # A forced step 0 has run by the time the plan is asked for.
                assert torch.isfinite(self.cache.features[0]).all()
            valid, kinds = self.cache.rollout_valid(4), self.denoiser.spec.stack.kinds
            return make_plan(logits, sparsity, valid, self.force, kinds)

        inpainting = None
        device = self.cache.store.device
        if known is not None:
            levels = torch.tensor(self.scheduler.noise_levels(), device=device)
            given = (part.to(device) for part in known)
            inpainting = Inpainting(levels, self.cache.initial_noise, *given)
        self.engine.observe(features.to(device))
        x, executed = self.engine.denoise(plan, Stopwatch(), inpainting)
        self.cache.commit(executed)
        return x.cpu().clone()


def assert_equal_over_ticks(runs: tuple[Run, Run], tolerance: float = 1e-4) -> None:
    """Two episodes of ticks at changing sparsity; the third tick of each holds actions."""
    rng = np.random.default_rng(0)
    known = torch.from_numpy(rng.standard_normal((8, 3), np.float32)), torch.rand(8)
    for episode in range(2):
        for run in runs:
            run.reset(episode)
        for tick, sparsity in enumerate((0.0, 0.5, 0.8, 0.0, 0.7)):
            features = torch.from_numpy(rng.standard_normal((1, 2, 7), np.float32))
            shape = (STEPS, runs[0].cache.blocks, 4)
            logits = rng.standard_normal(shape, np.float32)
            held = known if tick == 2 else None
            expected, x = (run.tick(features, logits, sparsity, held) for run in runs)
            limit = tolerance * max(1.0, float(expected.abs().max()))
            assert (x - expected).abs().max() < limit
            tokens = [run.engine.observation_tokens.cpu() for run in runs]
            assert (tokens[0] - tokens[1]).abs().max() < 1e-5
        features = [run.cache.features.cpu() for run in runs]
        assert (features[1] - features[0]).abs().max() < tolerance


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('scheduler', sorted(SCHEDULERS))
@pytest.mark.parametrize('force', [True, False])
@pytest.mark.parametrize('kind', DENOISERS)
@torch.inference_mode()
def test_equals_the_eager_engine_over_plans_held_actions_and_a_reset(
    kind: str, force: bool, scheduler: str, device: str
) -> None:
    captured = Run(kind, scheduler, force, Capture(torch.device(device)), device=device)
    assert_equal_over_ticks((Run(kind, scheduler, force), captured))


@pytest.mark.parametrize('kind', ['transformer', 'transformer_mixed'])
@torch.inference_mode()
def test_a_table_of_keys_and_values_equals_the_conditional_memory(kind: str) -> None:
    captured = Run(kind, 'ddim', True, Capture(CPU), table=True)
    assert_equal_over_ticks((Run(kind, 'ddim', True), captured))


@pytest.mark.parametrize('force', [True, False])
@pytest.mark.parametrize(
    ('kind', 'table'), [*((kind, False) for kind in DENOISERS), ('transformer', True)]
)
@torch.inference_mode()
def test_units_replay_as_they_were_recorded(kind: str, table: bool, force: bool) -> None:
    """Nothing that a graph would freeze may differ from tick to tick or from step to step."""
    capture = RecordedCapture()
    replayed = Run(kind, 'ddpm', force, capture, table)
    # Encoder, blocks, run; with and without held actions: begin, step 0, end and reused step.
    assert capture.units == 2 + replayed.cache.blocks + 2 * (3 + force)
    assert_equal_over_ticks((Run(kind, 'ddpm', force), replayed))


def test_recording_refuses_a_unit_that_waits_for_a_value() -> None:
    value = torch.zeros(1)
    with pytest.raises(AssertionError, match='the host waits'):
        RecordedCapture()(lambda: value.add_(value.item()))


def test_a_recording_freezes_what_python_decides() -> None:
    value, count = torch.zeros(1), iter(range(1, 9))
    unit = RecordedCapture()(lambda: value.add_(next(count)))
    unit()
    assert value.item() == 2  # a plain call would have added 2 to the first 1


@pytest.mark.parametrize('name', ['eager', 'packed', 'graphs'])
@torch.inference_mode()
def test_engines_are_selected_by_name(name: str) -> None:
    run = Run('transformer', 'ddim', True)
    engine = engine_maker(name)(run.denoiser, run.scheduler, run.cache, True)
    names = {'eager': 'EagerEngine', 'packed': 'CpuEngine', 'graphs': 'GraphEngine'}
    assert type(engine).__name__ == names[name]


@torch.inference_mode()
def test_unknown_and_unfit_engines_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="one of auto, eager, packed, graphs, triton, got 'fast'"):
        engine_maker('fast')
    run = Run('dit', 'ddim', True)
    with pytest.raises(ValueError, match=r"'packed' needs a transformer .* got DiTDenoiser"):
        ENGINES['packed'](run.denoiser, run.scheduler, run.cache, True)
