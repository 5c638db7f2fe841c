# SPDX-License-Identifier: Apache-2.0
"""The denoising loop as plain torch calls: the reference engine, and the loop of training.

The loop runs any denoiser on any device, for a batch of sequences that follow one plan, and it is
differentiable.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tts_policy.policy.denoisers.denoiser import Conditioner, Denoiser
from tts_policy.policy.engines.engine import Engine
from tts_policy.policy.feature_cache import FeatureCache
from tts_policy.policy.inpainting import Inpainting
from tts_policy.policy.plan import Plan, Segment, dense_plan, segments
from tts_policy.policy.schedulers.scheduler import Scheduler
from tts_policy.policy.stopwatch import Stopwatch


def denoise_dense(
    denoiser: Denoiser, scheduler: Scheduler, conditioner: Conditioner, cache: FeatureCache
) -> Tensor:
    """Run every block of every step and cache nothing; return normalised actions [B, T, A].

    The noise is that of the cache; the batch is that of the conditioner if the noise is for one.
    """
    x, x0 = cache.initial_noise, None
    for step in range(scheduler.spec.steps):
        tokens = denoiser.embed(x)
        for number, block in enumerate(denoiser.blocks):
            tokens = tokens + block(tokens, conditioner.conditioning(step, number))
        x, x0 = scheduler.step(step, x, denoiser.predict(tokens), cache.noise_of(step), x0)
    return x


class MaskedLoop:
    """The denoising loop of one tick by a plan: computed blocks are called, reused ones are not.

    x: the noisy actions [B, T, A] so far; x0: the clean ones that the last step predicted.
    Computed features are written to the cache. Where gradients are recorded, a feature reused in
    the tick in which it was computed carries its gradient; one of an earlier tick is a constant.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: Scheduler,
        conditioner: Conditioner,
        cache: FeatureCache,
        inpainting: Inpainting | None = None,
        resumed: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Begin a tick whose observation the conditioner has encoded.

        resumed: x and x0 to go on from, by default the noise in the cache.
        """
        self._denoiser, self._scheduler = denoiser, scheduler
        self._conditioner, self._cache, self._inpainting = conditioner, cache, inpainting
        self._cells = cache.features.flatten(0, 1)
        self._live: dict[int, Tensor] = {}
        self._sums: dict[tuple[int, ...], Tensor] = {}
        self.x0: Tensor | None = None
        self.x = cache.initial_noise
        if resumed is not None:
            self.x, self.x0 = resumed
        elif inpainting is not None:
            self.x = self.x.clone()
            inpainting.impose(0, self.x)

    def run(self, plan: Plan, first: int = 0, last: int | None = None) -> Tensor:
        """Run steps `first` to `last` - 1 of a plan, by default all; return x after them.

        The caller ends the tick with `cache.commit`.

        Raises
        ------
        PlanError
            if the plan reuses what does not exist.

        """
        by_step = segments(plan, self._denoiser.spec.stack.kinds)
        for step, parts in list(enumerate(by_step))[first:last]:
            tokens = self._denoiser.embed(self.x)
            for segment in parts:
                tokens = self.add_residuals(step, segment, tokens)
            self._finish(step, self._denoiser.predict(tokens))
        return self.x

    def add_residuals(self, step: int, segment: Segment, tokens: Tensor) -> Tensor:
        """Return the tokens [B, T, D] after the residual blocks of a segment."""
        if segment.sources:
            return tokens + self._sum(segment.sources)
        for block in segment.blocks:
            tokens = tokens + self.compute(step, block, tokens)
        return tokens

    def compute(self, step: int, block: int, tokens: Tensor) -> Tensor:
        """Compute the residual of a block from tokens [B, T, D] and write it to the cache."""
        conditioning = self._conditioner.conditioning(step, block)
        residual: Tensor = self._denoiser.blocks[block](tokens, conditioning)
        cell = step * self._cache.blocks + block
        self._cells[cell].copy_(residual.detach())
        if residual.requires_grad:
            self._live[cell] = residual
        return residual

    def feature(self, cell: int) -> Tensor:
        """Return the feature [B, T, D] that a cell, a flat index, computed last."""
        return self._live[cell] if cell in self._live else self._cells[cell]

    def _sum(self, sources: tuple[int, ...]) -> Tensor:
        if len(sources) == 1:
            return self.feature(sources[0])
        if sources not in self._sums:
            self._sums[sources] = torch.stack([self.feature(cell) for cell in sources]).sum(0)
        return self._sums[sources]

    def _finish(self, step: int, predicted: Tensor) -> None:
        noise = self._cache.noise_of(step)
        self.x, self.x0 = self._scheduler.step(step, self.x, predicted, noise, self.x0)
        if self._inpainting is not None:
            self._inpainting.impose(step + 1, self.x)


class EagerEngine(Engine):
    """The reference, on any device: every computed block is called through its own forward."""

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: Scheduler,
        cache: FeatureCache,
        force_first_step: bool,
    ) -> None:
        self._denoiser, self._scheduler, self._cache = denoiser, scheduler, cache
        self._conditioner = self.make_conditioner(denoiser, scheduler)
        self._first = dense_plan(cache.steps, cache.blocks) if force_first_step else None
        self.time_tokens = self._conditioner.time_tokens
        self.observation_tokens = self._conditioner.observation_tokens

    def make_conditioner(self, denoiser: Denoiser, scheduler: Scheduler) -> Conditioner:
        """Make the conditioner; a benchmark overrides this."""
        return denoiser.conditioner(scheduler.spec.timesteps())

    def observe(self, features: Tensor) -> None:
        """Encode the observation features [1, To, Do] of a tick."""
        self._conditioner.encode(features)
        self.observation_tokens = self._conditioner.observation_tokens

    def denoise(
        self, plan: Callable[[], Plan], watch: Stopwatch, inpainting: Inpainting | None = None
    ) -> tuple[Tensor, Plan]:
        """Denoise by a plan; see `Engine.denoise`."""
        loop = MaskedLoop(
            self._denoiser, self._scheduler, self._conditioner, self._cache, inpainting
        )
        first = 0
        if self._first is not None:
            first = 1
            loop.run(self._first, 0, first)
        watch.lap('first_step')
        executed = plan()
        watch.lap('plan')
        x = loop.run(executed, first)
        watch.lap('masked_steps')
        return x, executed
