# SPDX-License-Identifier: Apache-2.0
"""Engine of captured CUDA graphs: whatever the plan, a tick replays the same few units.

One graph each for the conditional encoder, the forced step 0, every residual block, a run of
reused blocks, the end of a step, and a step that is reused as a whole. They find the denoising
step, and the run, by counters on the device, which they advance themselves. The host only decides
what is launched (`launch_schedule`), so it waits for nothing but the plan. Any stack of declared
blocks will do.

On a CPU the units are called directly: slower than `CpuEngine`, the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tts_policy.policy.denoisers.denoiser import Conditioner, Denoiser
from tts_policy.policy.engines.capture import Capture, Capturer, Unit
from tts_policy.policy.engines.eager import Engine
from tts_policy.policy.engines.launch_schedule import launch_schedule
from tts_policy.policy.feature_cache import FeatureCache
from tts_policy.policy.inpainting import Inpainting
from tts_policy.policy.plan import Plan
from tts_policy.policy.scheduler import NoiseScheduler
from tts_policy.policy.stopwatch import Stopwatch
from tts_policy.policy.transfer import Upload

_COEFFICIENTS = 6


class DeviceScheduler:
    """Scheduler steps on tables that are indexed on the device; see `NoiseScheduler.step`.

    x: [1, T, A], the noisy actions, in and out.
    """

    def __init__(self, scheduler: NoiseScheduler, cache: FeatureCache) -> None:
        device, shape = cache.store.device, cache.initial_noise.shape
        self._cache, self._clip = cache, scheduler.clip
        coefficients = torch.tensor(scheduler.coefficients, device=device)
        # Coefficients of a step, then the noise that it adds: one row, one look-up.
        size = cache.initial_noise.numel()
        self._rows = torch.zeros(cache.steps, _COEFFICIENTS + size, device=device)
        self._rows[:, :_COEFFICIENTS] = coefficients
        self._noise_scale = coefficients[:, -1:]
        # Clean actions, noisy actions, prediction: what a step combines linearly.
        self._terms = torch.zeros(3, size, device=device)
        self.x = self._terms[1].view(shape)
        self._levels = torch.zeros(cache.steps + 1, *shape[1:], device=device)
        self._weights = torch.zeros(shape[1], 1, device=device)

    def begin(self) -> None:
        """Take the noise that the cache holds for this tick."""
        self.x.copy_(self._cache.initial_noise)
        noise = self._cache.step_noise
        if len(noise):
            torch.mul(noise.flatten(1), self._noise_scale, out=self._rows[:, _COEFFICIENTS:])

    def hold(self, inpainting: Inpainting) -> None:
        """Take the known actions of this tick, which `impose` sets."""
        self._levels.copy_(inpainting.levels)
        self._weights.copy_(inpainting.weights)

    def impose(self, level: Tensor) -> None:
        """Set the known actions at the level on the device, int64 [1]."""
        self.x.lerp_(self._levels.index_select(0, level), self._weights)

    def step(self, step: Tensor, predicted: Tensor) -> None:
        """Finish the step on the device, int64 [1], whose prediction is [1, T, A]."""
        row, terms = self._rows.index_select(0, step)[0], self._terms
        terms[2].copy_(predicted.flatten())
        torch.mv(terms[1:].t(), row[:2], out=terms[0])
        terms[0].clamp_(-self._clip, self._clip)
        terms[1].copy_(torch.addmv(row[_COEFFICIENTS:], terms.t(), row[2:5]))


@dataclass(frozen=True)
class _Units:
    """Units of a tick; by_number: those of a `LaunchSchedule`."""

    begin: Unit
    first_step: Unit | None
    by_number: list[Unit]


class GraphEngine(Engine):
    """Captured units of one sampler; results live in its buffers until the next tick."""

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: NoiseScheduler,
        cache: FeatureCache,
        force_first_step: bool,
        conditioner: Conditioner | None = None,
        capture: Capturer | None = None,
    ) -> None:
        """Capture everything, on a GPU.

        conditioner: the denoiser's own by default. capture: what makes units of functions.
        """
        spec, device = denoiser.spec, cache.store.device
        self._denoiser, self._cache = denoiser, cache
        self._force_first_step, self._kinds = force_first_step, spec.stack.kinds
        self._conditioner = conditioner or denoiser.conditioner(scheduler.spec.timesteps())
        self.time_tokens = self._conditioner.time_tokens
        self._scheduler = DeviceScheduler(scheduler, cache)
        self._features = torch.zeros(1, spec.obs_steps, spec.obs_features, device=device)
        self._tokens = torch.zeros(1, spec.horizon, spec.width, device=device)
        # Numbers of the step and of the run that come next.
        self._counters = torch.zeros(2, dtype=torch.int64, device=device)
        self._step, self._run = self._counters[:1], self._counters[1:]
        runs = (cache.steps * ((spec.blocks + 1) // 2), spec.blocks)
        self._runs = Upload(runs, torch.int64, device)
        cache.store[-1].zero_()
        self._capture_units(capture or Capture(device))

    def _capture_units(self, capture: Capturer) -> None:
        # The first one, for its results stay in the memory of its graph and the others read them.
        self._observe = capture(lambda: self._conditioner.encode(self._features))
        self.observation_tokens = self._conditioner.observation_tokens
        start = self._rewind
        blocks = [
            capture(partial(self._compute, block), start) for block in range(self._cache.blocks)
        ]
        add_run = capture(self._add_run, start)
        self._units = {}
        for held in (False, True):
            self._units[held] = _Units(
                capture(partial(self._begin_tick, held)),
                capture(partial(self._run_first_step, held), start)
                if self._force_first_step
                else None,
                [
                    *blocks,
                    add_run,
                    capture(partial(self._end_step, held), start),
                    capture(partial(self._reuse_step, held), start),
                ],
            )

    def observe(self, features: Tensor) -> None:
        """Encode the observation features [1, To, Do] of a tick."""
        self._features.copy_(features, non_blocking=True)
        self._observe()
        self.observation_tokens = self._conditioner.observation_tokens

    def denoise(
        self, plan: Callable[[], Plan], watch: Stopwatch, inpainting: Inpainting | None = None
    ) -> tuple[Tensor, Plan]:
        """Run the loop by a plan; see `Engine.denoise`."""
        if inpainting is not None:
            self._scheduler.hold(inpainting)
        units = self._units[inpainting is not None]
        units.begin()
        if units.first_step is not None:
            units.first_step()
        watch.lap('first_step')
        executed = plan()
        watch.lap('plan')
        schedule = launch_schedule(executed, self._kinds, int(self._force_first_step))
        self._runs.send(schedule.runs)
        watch.lap('schedule')
        for number in schedule.units:
            units.by_number[number]()
        watch.lap('masked_steps')
        return self._scheduler.x, executed

    def _rewind(self) -> None:
        self._counters.zero_()

    def _begin_tick(self, held: bool) -> None:
        self._rewind()
        self._scheduler.begin()
        self._embed(held)

    def _embed(self, held: bool) -> None:
        """Open the step that comes next."""
        if held:
            self._scheduler.impose(self._step)
        self._tokens.copy_(self._denoiser.embed(self._scheduler.x))

    def _run_first_step(self, held: bool) -> None:
        for block in range(self._cache.blocks):
            self._compute(block)
        self._end_step(held)

    def _compute(self, block: int) -> None:
        conditioning = self._conditioner.conditioning(self._step, block)
        residual = self._denoiser.blocks[block](self._tokens, conditioning)
        self._cache.features[:, block].index_copy_(0, self._step, residual)
        self._tokens.add_(residual)

    def _add_run(self) -> None:
        cells = self._runs.device.index_select(0, self._run)[0]
        self._tokens.add_(self._cache.store.index_select(0, cells).sum(0))
        self._run.add_(1)

    def _end_step(self, held: bool) -> None:
        self._scheduler.step(self._step, self._denoiser.predict(self._tokens))
        self._step.add_(1)
        self._embed(held)

    def _reuse_step(self, held: bool) -> None:
        self._add_run()
        self._end_step(held)
