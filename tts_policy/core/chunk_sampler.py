# SPDX-License-Identifier: Apache-2.0
"""Sampling of action chunks from observation features, over the ticks of an episode.

Pruner, plan and denoising of one tick; owns the lattice, which survives it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tts_policy.core.denoiser import Denoiser
from tts_policy.core.engine import Engine
from tts_policy.core.engines import make_engine
from tts_policy.core.inpainting import Inpainting
from tts_policy.core.lattice import Lattice
from tts_policy.core.plan import Plan, dense_plan, make_plan
from tts_policy.core.pruner import PlanPruner
from tts_policy.core.sampler import SamplerSpec
from tts_policy.core.scheduler import NoiseScheduler
from tts_policy.core.stopwatch import Stopwatch

EngineMaker = Callable[[Denoiser, NoiseScheduler, Lattice, bool], Engine]


class ChunkSampler:
    """One sampler of a policy on the device of its denoiser; used from one thread."""

    def __init__(
        self,
        denoiser: Denoiser,
        spec: SamplerSpec,
        pruner: PlanPruner | None,
        seed: int = 0,
        engine: EngineMaker = make_engine,
    ) -> None:
        """Allocate buffers and fold tables; modules must be in evaluation mode already."""
        device = denoiser.device
        self.spec, self._pruner = spec, pruner
        self._kinds = denoiser.spec.stack.kinds
        self._generator = torch.Generator().manual_seed(seed)
        steps = spec.scheduler.steps
        with torch.inference_mode():
            self._scheduler = scheduler = NoiseScheduler(spec.scheduler)
            self.lattice = Lattice(denoiser.spec, steps, scheduler.needs_noise, device)
            self._engine = engine(denoiser, scheduler, self.lattice, spec.force_first_step)
            if pruner is not None:
                self._gates = pruner.gates(self._engine.time_tokens)
        self._stream = torch.cuda.Stream(device) if device.type == 'cuda' else None
        self.dense = dense_plan(steps, denoiser.spec.blocks)
        self.reset()

    def reset(self, seed: int | None = None) -> None:
        """Start a new episode: forget all cached features, draw new noise.

        With a seed the episode's noise depends on it alone.
        """
        if seed is not None:
            self._generator.manual_seed(seed)
        with torch.inference_mode():
            self.lattice.reset(self._generator)

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
        Returns normalised actions [1, T, A], the plan that was executed and the age in ticks of
        the oldest feature that it read.
        """
        self._engine.observe(features)
        watch.lap('conditional_encoder')
        if not self.spec.hold_noise and self.lattice.tick > 0:
            self.lattice.draw_noise(self._generator)
        request = self._request_plan(sparsity)
        watch.lap('pruner')
        inpainting = None
        if known is not None:
            inpainting = Inpainting(self._scheduler, self.lattice.initial_noise, *known)
        x, plan = self._engine.denoise(request, watch, inpainting)
        return x, plan, self.lattice.commit(plan)

    def _request_plan(self, sparsity: float) -> Callable[[], Plan]:
        """Start the pruner; the returned function waits for its plan."""
        if sparsity == 0.0 or self._pruner is None or self.lattice.tick == 0:
            return lambda: self.dense
        valid = self.lattice.rollout_valid(self.spec.max_rollout_age)
        tokens = self._engine.observation_tokens
        if self._stream is None:
            logits = self._pruner(self._gates, tokens, sparsity)[0]
            plan = self._plan(logits, sparsity, valid)
            return lambda: plan
        self._stream.wait_stream(torch.cuda.current_stream(tokens.device))
        with torch.cuda.stream(self._stream):
            on_device = self._pruner(self._gates, tokens, sparsity)[0]
            logits = torch.empty(on_device.shape, pin_memory=True)
            logits.copy_(on_device, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._stream)

        def wait() -> Plan:
            done.synchronize()
            return self._plan(logits, sparsity, valid)

        return wait

    def _plan(self, logits: Tensor, sparsity: float, valid: NDArray[np.bool_]) -> Plan:
        forced = self.spec.force_first_step
        return make_plan(logits.numpy(), sparsity, valid, forced, self._kinds)
