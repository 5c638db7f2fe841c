# SPDX-License-Identifier: Apache-2.0
"""Small random denoisers and engines that run them over ticks, for the tests of the engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tts_policy.policy.denoisers.denoiser import Denoiser
from tts_policy.policy.denoisers.dit import DiTDenoiser, DiTSpec
from tts_policy.policy.denoisers.transformer import TransformerDenoiser, TransformerSpec
from tts_policy.policy.engines.engine import Engine
from tts_policy.policy.feature_cache import FeatureCache
from tts_policy.policy.inpainting import Inpainting
from tts_policy.policy.plan import Plan, make_plan
from tts_policy.policy.schedulers.scheduler import Scheduler, SchedulerSpec
from tts_policy.policy.stopwatch import Stopwatch

STEPS = 6
SIZES: dict[str, Any] = {
    'action_dim': 3,
    'horizon': 8,
    'obs_steps': 2,
    'obs_features': 7,
    'width': 32,
    'layers': 2,
    'heads': 2,
}
SCHEDULERS = {
    'ddpm': SchedulerSpec('ddpm', STEPS, STEPS),
    'ddim': SchedulerSpec('ddim', STEPS, 60),
    'ddim_sample': SchedulerSpec('ddim', STEPS, 60, prediction='sample', clip=0.5, steps_offset=1),
    'ddpm_sample': SchedulerSpec('ddpm', STEPS, STEPS, prediction='sample', clip=0.0),
    'dpm_solver': SchedulerSpec('dpm_solver', STEPS, 60, 'linear', beta_end=0.1),
    'flow': SchedulerSpec('flow', STEPS, prediction='velocity', clip=0.0),
}
CPU = torch.device('cpu')
MakeEngine = Callable[[Denoiser, Scheduler, FeatureCache, bool], Engine]


def random_denoiser(kind: str = 'transformer', half: bool = False, **options: Any) -> Denoiser:
    """Make a denoiser of fixed random weights, in evaluation mode.

    half: weights that half precision holds exactly, as those of a bundle.
    """
    torch.manual_seed(0)
    denoiser: Denoiser
    if kind == 'mixing':
        options['cond_layers'] = 1
    if kind == 'dit':
        denoiser = DiTDenoiser(DiTSpec(**{**SIZES, 'time_features': 16, **options}))
    else:
        denoiser = TransformerDenoiser(TransformerSpec(**{**SIZES, **options}))
    denoiser.eval().requires_grad_(False)
    for parameter in denoiser.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.1)
        if half:
            parameter.copy_(parameter.half())
    return denoiser


def random_logits(rng: np.random.Generator, cache: FeatureCache) -> NDArray[np.float32]:
    return rng.standard_normal((cache.steps, cache.blocks, 4), np.float32)


def random_features(rng: np.random.Generator, batch: int = 1) -> Tensor:
    return torch.from_numpy(rng.standard_normal((batch, 2, 7), np.float32))


class Run:
    """An engine with a feature cache of its own, run tick by tick."""

    def __init__(
        self,
        make: MakeEngine,
        scheduler: str = 'ddim',
        force: bool = True,
        denoiser: Denoiser | None = None,
    ) -> None:
        denoiser = denoiser or random_denoiser()
        self.kinds, self.force = denoiser.spec.stack.kinds, force
        self.scheduler = SCHEDULERS[scheduler].make()
        self.cache = FeatureCache(
            denoiser.spec, STEPS, self.scheduler.needs_noise, denoiser.device
        )
        self.engine = make(denoiser, self.scheduler, self.cache, force)
        self.reset(0)

    def reset(self, seed: int) -> None:
        self.engine.prepare()
        self.cache.reset(torch.Generator().manual_seed(seed))

    def tick(
        self,
        features: Tensor,
        logits: NDArray[np.float32],
        sparsity: float,
        known: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Normalised actions [1, T, A] of a tick, by the plan that the logits give."""

        def plan() -> Plan:
            if self.force and self.cache.tick == 0:
                # A forced step 0 has run by the time the plan is asked for.
                assert torch.isfinite(self.cache.features[0]).all()
            valid = self.cache.rollout_valid(4)
            return make_plan(logits, sparsity, valid, self.force, self.kinds)

        inpainting = None
        if known is not None:
            levels = torch.tensor(self.scheduler.noise_levels())
            inpainting = Inpainting.of(levels, self.cache.initial_noise, *known)
        self.engine.observe(features)
        x, executed = self.engine.denoise(plan, Stopwatch(), inpainting)
        self.cache.commit(executed)
        return x
