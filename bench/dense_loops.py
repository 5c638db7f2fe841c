# SPDX-License-Identifier: Apache-2.0
"""What a user of a GPU would do instead of sparsity: dense sampling without launch overhead."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tts_policy.policy.denoisers.denoiser import Denoiser
from tts_policy.policy.engines.cuda import GraphCapture
from tts_policy.policy.engines.eager import denoise_dense
from tts_policy.policy.feature_cache import FeatureCache
from tts_policy.policy.sampler import SamplerSpec

Sample = Callable[[Tensor], Tensor]


class DenseSampler:
    """The plain dense loop with the conditional encoding of a tick, on static buffers."""

    def __init__(self, denoiser: Denoiser, spec: SamplerSpec) -> None:
        self._denoiser, self._scheduler = denoiser, spec.scheduler.make()
        self._conditioner = denoiser.conditioner(spec.scheduler.timesteps())
        self._cache = FeatureCache(
            denoiser.spec, spec.scheduler.steps, self._scheduler.needs_noise, denoiser.device
        )
        self._cache.reset(torch.Generator().manual_seed(0))

    def sample(self, features: Tensor) -> Tensor:
        """Normalised actions [1, T, A] from features [1, To, Do]."""
        self._conditioner.encode(features)
        return denoise_dense(self._denoiser, self._scheduler, self._conditioner, self._cache)


def captured_dense(denoiser: Denoiser, spec: SamplerSpec) -> Sample:
    """Dense sampling as one captured CUDA graph; a plain call on a CPU."""
    dense, size = DenseSampler(denoiser, spec), denoiser.spec
    features = torch.zeros(1, size.obs_steps, size.obs_features, device=denoiser.device)
    actions = torch.zeros(1, size.horizon, size.action_dim, device=denoiser.device)

    def run() -> None:
        actions.copy_(dense.sample(features))

    on_gpu = denoiser.device.type == 'cuda'
    replay = GraphCapture(denoiser.device)(run) if on_gpu else run

    def sample(observed: Tensor) -> Tensor:
        features.copy_(observed)
        replay()
        return actions

    return sample


class CompiledDenoiser(torch.nn.Module):
    """One pass of the network, conditional encoder included, as torch.compile sees it."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self._denoiser = denoiser

    def forward(self, x: Tensor, t: Tensor, features: Tensor) -> Tensor:
        """Prediction [1, T, A] for x at time t [1], given features."""
        predicted: Tensor = self._denoiser(x, t, features)
        return predicted


def compiled_dense(denoiser: Denoiser, spec: SamplerSpec) -> Sample:
    """Dense sampling by a network under torch.compile(mode='reduce-overhead'), a call a step."""
    scheduler = spec.scheduler.make()
    network = torch.compile(CompiledDenoiser(denoiser), mode='reduce-overhead')
    cache = FeatureCache(
        denoiser.spec, spec.scheduler.steps, scheduler.needs_noise, denoiser.device
    )
    cache.reset(torch.Generator().manual_seed(0))
    times = [torch.full((1,), t, device=denoiser.device) for t in spec.scheduler.timesteps()]

    def sample(features: Tensor) -> Tensor:
        x, x0 = cache.initial_noise, None
        for step, t in enumerate(times):
            noise = cache.step_noise[step] if len(cache.step_noise) else None
            # A replayed graph writes its output anew at the next call.
            x, x0 = scheduler.step(step, x, network(x, t, features).clone(), noise, x0)
        return x

    return sample
