# SPDX-License-Identifier: Apache-2.0
"""Sampling of action chunks from observation features, over the ticks of an episode.

Pruner, plan and denoising of one tick; owns the cache, which survives it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tts_policy.policy.denoisers.denoiser import Denoiser, DenoiserSpec
from tts_policy.policy.engines.capture import Capture
from tts_policy.policy.engines.eager import EagerEngine
from tts_policy.policy.engines.registry import EngineMaker, make_engine
from tts_policy.policy.feature_cache import FeatureCache
from tts_policy.policy.inpainting import Inpainting
from tts_policy.policy.plan import Plan, dense_plan, make_plan
from tts_policy.policy.pruner import PlanPruner
from tts_policy.policy.pruner_runner import CapturedPruner, InlinePruner
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.policy.scheduler import NoiseScheduler
from tts_policy.policy.stopwatch import Stopwatch


class ChunkSampler:
    """One sampler of a policy on the device of its denoiser; used from one thread."""

    def __init__(
        self,
        denoiser: Denoiser,
        spec: SamplerSpec,
        pruner: PlanPruner | None,
        seed: int = 0,
        engine: EngineMaker = make_engine,
        overlap_pruner: bool = True,
    ) -> None:
        """Allocate buffers and fold tables; modules must be in evaluation mode already.

        overlap_pruner: on a GPU the pruner gets a stream of its own.
        """
        device = denoiser.device
        self.spec = spec
        self._kinds = denoiser.spec.stack.kinds
        self._generator = torch.Generator().manual_seed(seed)
        steps = spec.scheduler.steps
        with torch.inference_mode():
            scheduler = NoiseScheduler(spec.scheduler)
            self._noise_levels = torch.tensor(scheduler.noise_levels(), device=device)
            self.cache = FeatureCache(
                denoiser.spec,
                steps,
                scheduler.needs_noise,
                device,
                temperature=spec.temperature,
            )
            self._engine = engine(denoiser, scheduler, self.cache, spec.force_first_step)
            self._pruner = (
                None if pruner is None else self._runner(pruner, denoiser.spec, overlap_pruner)
            )
        self.dense = dense_plan(steps, denoiser.spec.blocks)
        self.reset()

    def _runner(self, pruner: PlanPruner, spec: DenoiserSpec, overlap: bool) -> InlinePruner:
        time_tokens = self._engine.time_tokens
        if time_tokens.device.type != 'cuda':
            return InlinePruner(pruner, time_tokens)
        tokens = time_tokens.new_zeros(1, spec.obs_steps, spec.memory_width)
        # The eager engine is what runs by default, and capturing was never run on a GPU.
        eager = isinstance(self._engine, EagerEngine)
        capture = Capture(torch.device('cpu')) if eager else None
        return CapturedPruner(pruner, time_tokens, tokens, overlap, capture)

    def reset(self, seed: int | None = None) -> None:
        """Start a new episode: forget all cached features, draw new noise.

        With a seed the episode's noise depends on it alone.
        """
        if seed is not None:
            self._generator.manual_seed(seed)
        with torch.inference_mode():
            self.cache.reset(self._generator)

    @torch.inference_mode()
    def sample(
        self,
        features: Tensor,
        sparsity: float,
        watch: Stopwatch,
        known: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Plan, int]:
        """Sample the chunk of one tick from observation features [1, To, Do].

        known: normalised actions [T, A] to hold, and weights [T] that say which and how firmly.
        Returns normalised actions [1, T, A], in a buffer that the next call may overwrite, the
        plan that was executed and the age in ticks of the oldest feature that it read.
        """
        self._engine.observe(features)
        watch.lap('conditional_encoder')
        if not self.spec.hold_noise and self.cache.tick > 0:
            self.cache.draw_noise(self._generator)
        request = self._request_plan(sparsity)
        watch.lap('pruner')
        inpainting = None
        if known is not None:
            inpainting = Inpainting(self._noise_levels, self.cache.initial_noise, *known)
        x, plan = self._engine.denoise(request, watch, inpainting)
        return x, plan, self.cache.commit(plan)

    @torch.inference_mode()
    def plan(self, features: Tensor, sparsity: float) -> Plan:
        """Plan that a tick with these observation features [1, To, Do] would execute."""
        self._engine.observe(features)
        return self._request_plan(sparsity)()

    def _request_plan(self, sparsity: float) -> Callable[[], Plan]:
        """Start the pruner; the returned function waits for its plan."""
        pruner = self._pruner
        if sparsity == 0.0 or pruner is None or self.cache.tick == 0:
            return lambda: self.dense
        valid = self.cache.rollout_valid(self.spec.max_rollout_age)
        pruner.start(self._engine.observation_tokens, sparsity)
        forced = self.spec.force_first_step
        return lambda: make_plan(pruner.logits(), sparsity, valid, forced, self._kinds)
