# SPDX-License-Identifier: Apache-2.0
"""Sampling of action chunks from observation features: pruner, plan and denoising of a tick."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from tts_policy.policy.denoisers.denoiser import Denoiser
from tts_policy.policy.device import Download
from tts_policy.policy.engines.engine import Engine
from tts_policy.policy.engines.registry import AUTO, find_engine
from tts_policy.policy.feature_cache import FeatureCache
from tts_policy.policy.inpainting import Inpainting
from tts_policy.policy.plan import Plan, dense_plan, make_plan
from tts_policy.policy.pruner import PlanPruner
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.policy.stopwatch import Stopwatch


class PrunerRunner:
    """Runs a pruner: on a GPU on a stream of its own, beside what the main stream does."""

    def __init__(self, pruner: PlanPruner, time_tokens: Tensor, overlap: bool = True) -> None:
        """Compute what depends on the time tokens [K, .]; overlap: run on a stream of its own."""
        self._pruner, self._gates = pruner, pruner.gates(time_tokens)
        self._device = time_tokens.device
        on_gpu = self._device.type == 'cuda'
        self._stream = torch.cuda.Stream(self._device) if on_gpu and overlap else None
        self._download: Download | None = None

    def start(self, observation_tokens: Tensor, sparsity: float) -> None:
        """Start on the observation tokens [1, To, .]."""
        # The memory of tensors that another stream reads must not be used anew before `logits`.
        self._observation_tokens = observation_tokens
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._logits = self._pruner(self._gates, observation_tokens, sparsity)[0]
            if self._download is None:
                shape = tuple(self._logits.shape)
                self._download = Download(shape, self._logits.dtype, self._device)
            self._download.start(self._logits)

    def logits(self) -> NDArray[Any]:
        """Wait for the logits [K, N, 4]; the next start overwrites them."""
        assert self._download is not None, 'start comes first'
        return self._download.wait()


class ChunkSampler:
    """One sampler of a policy on the device of its denoiser; used from one thread.

    cache: the features and the noise that survive a tick.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        spec: SamplerSpec,
        pruner: PlanPruner | None,
        seed: int = 0,
        engine: str | type[Engine] = AUTO,
        overlap_pruner: bool = True,
    ) -> None:
        """Allocate buffers and compute tables; modules must be in evaluation mode.

        engine: a name, see `find_engine`, or a class. overlap_pruner: see `PrunerRunner`.

        Raises
        ------
        ValueError
            if there is no such engine, or it does not support the denoiser or its device.

        """
        device = denoiser.device
        make = find_engine(engine, denoiser, device) if isinstance(engine, str) else engine
        self.spec = spec
        self.dense = dense_plan(spec.scheduler.steps, denoiser.spec.blocks)
        self._kinds = denoiser.spec.stack.kinds
        self._generator = torch.Generator().manual_seed(seed)
        scheduler = spec.scheduler.make()
        with torch.inference_mode():
            self._noise_levels = torch.tensor(scheduler.noise_levels(), device=device)
            self.cache = FeatureCache(
                denoiser.spec,
                spec.scheduler.steps,
                scheduler.needs_noise,
                device,
                spec.temperature,
            )
            self._engine = make(denoiser, scheduler, self.cache, spec.force_first_step)
            self._pruner = None
            if pruner is not None:
                self._pruner = PrunerRunner(pruner, self._engine.time_tokens, overlap_pruner)
        self.reset()

    def reset(self, seed: int | None = None) -> None:
        """Start an episode: forget all cached features and draw new noise.

        With a seed the episode's noise depends on the seed alone.
        """
        if seed is not None:
            self._generator.manual_seed(seed)
        with torch.inference_mode():
            self._engine.prepare()
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
        Returns normalised actions [1, T, A], which the next call may overwrite, the plan that was
        executed, and the age in ticks of the oldest feature that it reused.
        """
        self._engine.observe(features)
        watch.lap('conditional_encoder')
        if not self.spec.hold_noise and self.cache.tick > 0:
            self.cache.draw_noise(self._generator)
        plan = self._request_plan(sparsity)
        watch.lap('pruner')
        inpainting = None
        if known is not None:
            inpainting = Inpainting.of(self._noise_levels, self.cache.initial_noise, *known)
        x, executed = self._engine.denoise(plan, watch, inpainting)
        return x, executed, self.cache.commit(executed)

    @torch.inference_mode()
    def plan(self, features: Tensor, sparsity: float) -> Plan:
        """Plan that a tick with these observation features [1, To, Do] would execute."""
        self._engine.observe(features)
        return self._request_plan(sparsity)()

    def _request_plan(self, sparsity: float) -> Callable[[], Plan]:
        """Start the pruner and return a function that waits for its plan."""
        pruner = self._pruner
        if sparsity == 0.0 or pruner is None or self.cache.tick == 0:
            return lambda: self.dense
        valid = self.cache.rollout_valid(self.spec.max_rollout_age)
        pruner.start(self._engine.observation_tokens, sparsity)
        forced = self.spec.force_first_step
        return lambda: make_plan(pruner.logits(), sparsity, valid, forced, self._kinds)
