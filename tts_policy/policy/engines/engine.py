# SPDX-License-Identifier: Apache-2.0
"""The interface of the engines, which run the denoising loop of one sampler on one device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from tts_policy.policy.denoisers.denoiser import Denoiser
from tts_policy.policy.feature_cache import FeatureCache
from tts_policy.policy.inpainting import Inpainting
from tts_policy.policy.plan import Plan
from tts_policy.policy.schedulers.scheduler import Scheduler
from tts_policy.policy.stopwatch import Stopwatch


class Engine(ABC):
    """Conditional encoding and denoising, tick by tick; what survives a tick is in the cache.

    time_tokens: [K, .], computed once; observation_tokens: [1, To, .], after `observe`. A pruner
    reads these two.
    """

    time_tokens: Tensor
    observation_tokens: Tensor

    @abstractmethod
    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: Scheduler,
        cache: FeatureCache,
        force_first_step: bool,
    ) -> None:
        """Prepare weights and buffers; the denoiser must be one that the engine supports."""

    @staticmethod
    def unsupported(denoiser: Denoiser, device: torch.device) -> str:
        """Say why the engine cannot run a denoiser on a device; empty if it can."""
        return ''

    def prepare(self, plans: Iterable[Plan] = ()) -> None:  # noqa: B027  # most have nothing to do
        """Get ready for plans that may come, between ticks; it may take longer than a tick."""

    @abstractmethod
    def observe(self, features: Tensor) -> None:
        """Encode the observation features [1, To, Do] of a tick."""

    @abstractmethod
    def denoise(
        self, plan: Callable[[], Plan], watch: Stopwatch, inpainting: Inpainting | None = None
    ) -> tuple[Tensor, Plan]:
        """Denoise by a plan; return normalised actions [1, T, A] and the plan that was executed.

        `plan()` is called once. If step 0 is forced, it is called after step 0 has been launched,
        so that a pruner can run beside that step. The next call may overwrite the actions. The
        caller ends the tick with `cache.commit`. `inpainting` holds actions that are known.

        Raises
        ------
        PlanError
            if the plan reuses what does not exist.

        """
