# SPDX-License-Identifier: Apache-2.0
"""The interface of the engines that run the denoising loop, and the eager one, the reference.

`denoise_masked` never calls a block that the plan reuses. Runs of consecutive reused blocks are
one addition of a sum, and a sum is formed once a tick: within a tick a cell is written at most
once, before anything in the tick reads it, so equal sources mean equal sums.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tts_policy.policy.denoisers.denoiser import Conditioner, Denoiser
from tts_policy.policy.feature_cache import FeatureCache
from tts_policy.policy.inpainting import Inpainting
from tts_policy.policy.plan import Plan, Reuse, resolve_sources
from tts_policy.policy.scheduler import NoiseScheduler
from tts_policy.policy.stopwatch import Stopwatch


def _noise(cache: FeatureCache, step: int) -> Tensor | None:
    return cache.step_noise[step] if len(cache.step_noise) else None


def denoise_dense(
    denoiser: Denoiser, scheduler: NoiseScheduler, conditioner: Conditioner, cache: FeatureCache
) -> Tensor:
    """Plain loop over every block of every step; reads the held noise and caches nothing.

    Returns normalised actions [1, T, A].
    """
    x = cache.initial_noise
    for step in range(scheduler.spec.steps):
        tokens = denoiser.embed(x)
        for number, block in enumerate(denoiser.blocks):
            tokens = tokens + block(tokens, conditioner.conditioning(step, number))
        x = scheduler.step(step, x, denoiser.predict(tokens), _noise(cache, step))
    return x


class MaskedStep:
    """Runs the cells of single denoising steps of one tick against the cache."""

    def __init__(self, denoiser: Denoiser, conditioner: Conditioner, cache: FeatureCache) -> None:
        self._denoiser, self._conditioner, self._cache = denoiser, conditioner, cache
        self._cells = cache.features.flatten(0, 1)
        self._sums: dict[bytes, Tensor] = {}

    def run(
        self, step: int, tokens: Tensor, computed: NDArray[np.bool_], sources: NDArray[np.int64]
    ) -> Tensor:
        """Residual blocks of one step: tokens [1, T, D] in and out.

        computed: bool [N]; sources: flat cell index [N], read where a block is reused.
        """
        for is_computed, run in groupby(range(len(computed)), key=computed.__getitem__):
            blocks = list(run)
            if is_computed:
                tokens = self._compute(step, tokens, blocks)
            else:
                tokens = tokens + self._sum(sources[blocks[0] : blocks[-1] + 1])
        return tokens

    def _compute(self, step: int, tokens: Tensor, blocks: list[int]) -> Tensor:
        features = self._cache.features[step]
        for block in blocks:
            cond = self._conditioner.conditioning(step, block)
            residual = self._denoiser.blocks[block](tokens, cond)
            features[block].copy_(residual[0])
            tokens = tokens + residual
        return tokens

    def _sum(self, sources: NDArray[np.int64]) -> Tensor:
        if len(sources) == 1:
            return self._cells[sources[0]]
        key = sources.tobytes()
        if key not in self._sums:
            index = torch.from_numpy(sources).to(self._cells.device, non_blocking=True)
            self._sums[key] = self._cells.index_select(0, index).sum(0)
        return self._sums[key]


def denoise_masked(
    denoiser: Denoiser,
    scheduler: NoiseScheduler,
    conditioner: Conditioner,
    cache: FeatureCache,
    plan: Callable[[], Plan],
    force_first_step: bool,
    inpainting: Inpainting | None = None,
) -> tuple[Tensor, Plan]:
    """Denoise by a plan; returns normalised actions [1, T, A] and the plan that was executed.

    The caller closes the tick with `cache.commit`.

    `plan()` is called once: with step 0 forced only after step 0 has been launched, so that the
    pruner runs beside it, otherwise before.

    Raises
    ------
    PlanError
        if the plan reuses what does not exist.

    """
    runner = MaskedStep(denoiser, conditioner, cache)
    x = cache.initial_noise
    if inpainting is not None:
        x = x.clone()
        inpainting.impose(0, x)

    def finish(step: int, x: Tensor, tokens: Tensor) -> Tensor:
        x = scheduler.step(step, x, denoiser.predict(tokens), _noise(cache, step))
        if inpainting is not None:
            inpainting.impose(step + 1, x)
        return x

    first = 1 if force_first_step else 0
    if force_first_step:
        everything = np.ones(denoiser.spec.blocks, bool)
        tokens = runner.run(0, denoiser.embed(x), everything, np.empty(0, np.int64))
        x = finish(0, x, tokens)
    executed = plan()
    sources = resolve_sources(executed, denoiser.spec.stack.kinds)
    computed = executed == Reuse.COMPUTE
    for step in range(first, scheduler.spec.steps):
        tokens = runner.run(step, denoiser.embed(x), computed[step], sources[step])
        x = finish(step, x, tokens)
    return x, executed


class Engine(ABC):
    """Conditional encoding and denoising of one sampler; what survives a tick is in the cache.

    time_tokens: [K, .], folded at load; observation_tokens: [1, To, .] after `observe`.
    """

    time_tokens: Tensor
    observation_tokens: Tensor

    @abstractmethod
    def observe(self, features: Tensor) -> None:
        """Encode the observation features [1, To, Do] of a tick."""

    @abstractmethod
    def denoise(
        self, plan: Callable[[], Plan], watch: Stopwatch, inpainting: Inpainting | None = None
    ) -> tuple[Tensor, Plan]:
        """Denoise by a plan; returns normalised actions [1, T, A] and the plan executed.

        `plan()` is called once: with step 0 forced only after step 0 has been launched, otherwise
        before. The actions may be in a buffer that the next call overwrites. The caller closes the
        tick with `cache.commit`. `inpainting` holds the actions that are known already.

        Raises
        ------
        PlanError
            if the plan reuses what does not exist.

        """


class EagerEngine(Engine):
    """The reference, on any device: every computed block called through its own forward."""

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: NoiseScheduler,
        cache: FeatureCache,
        force_first_step: bool,
        conditioner: Conditioner | None = None,
    ) -> None:
        self._denoiser, self._scheduler, self._cache = denoiser, scheduler, cache
        self._force_first_step = force_first_step
        self._conditioner = conditioner or denoiser.conditioner(scheduler.spec.timesteps())
        self.time_tokens = self._conditioner.time_tokens
        self.observation_tokens = self._conditioner.observation_tokens

    def observe(self, features: Tensor) -> None:
        """Encode the observation features [1, To, Do] of a tick."""
        self._conditioner.encode(features)
        self.observation_tokens = self._conditioner.observation_tokens

    def denoise(
        self, plan: Callable[[], Plan], watch: Stopwatch, inpainting: Inpainting | None = None
    ) -> tuple[Tensor, Plan]:
        """Denoise by a plan; see `Engine.denoise`."""

        def timed_plan() -> Plan:
            watch.lap('first_step')
            executed = plan()
            watch.lap('plan')
            return executed

        result = denoise_masked(
            self._denoiser,
            self._scheduler,
            self._conditioner,
            self._cache,
            timed_plan,
            self._force_first_step,
            inpainting,
        )
        watch.lap('masked_steps')
        return result
