# SPDX-License-Identifier: Apache-2.0
"""The test-time sparse diffusion policy: an observation window in, an action chunk out.

One policy object owns the model state that survives a control tick (the cache, with the held
noise) and is used from one thread. The first tick after `reset` is dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tts_policy.policy import flops
from tts_policy.policy.bundle import Bundle, load_bundle
from tts_policy.policy.chunk_sampler import ChunkSampler
from tts_policy.policy.contract import CommittedActions, PolicyContract
from tts_policy.policy.denoisers.blocks import BlockStack
from tts_policy.policy.frame_encoder import FrameEncoder
from tts_policy.policy.plan import Plan, realised_sparsity, reuse_mix
from tts_policy.policy.stopwatch import Stopwatch
from tts_policy.policy.threads import set_threads
from tts_policy.policy.transfer import Download, Upload

DEVICES = ('cpu', 'cuda')


class WindowError(ValueError):
    """An observation window that does not meet the contract."""


@dataclass(frozen=True)
class ChunkStats:
    """What one chunk cost.

    sparsity: realised share of reused cells; flops: conditional encoder, pruner and executed
    decoder; dense_flops: conditional encoder and dense decoder; stages_s: host time of every
    stage (on a GPU that is launch time, only latency_s is complete); oldest_rollout_ticks: age of
    the oldest feature of an earlier tick that was read.
    """

    sparsity: float
    flops: int
    dense_flops: int
    latency_s: float
    stages_s: dict[str, float]
    reuse_mix: dict[str, float]
    oldest_rollout_ticks: int


@dataclass(frozen=True)
class Chunk:
    """Usable set-points [n, A] in robot units from the newest observation on, and their plan.

    blocks: the residual blocks that the columns of the plan stand for.
    """

    actions: NDArray[np.float64]
    plan: Plan
    blocks: BlockStack
    stats: ChunkStats


class TestTimeSparsePolicy:
    """A bundle's policy run by one of its samplers on one device."""

    __test__ = False  # the name starts with Test, but pytest has nothing to collect here

    def __init__(
        self,
        bundle: Bundle,
        sampler: str,
        device: str = 'cpu',
        seed: int = 0,
        engine: str = 'auto',
    ) -> None:
        """Set up buffers and folded tables.

        engine: of `core.engines.ENGINES`.

        Raises
        ------
        BundleError
            if the bundle has no such sampler.
        ValueError
            if the device is not available, or the engine cannot run the policy there.

        """
        if device not in DEVICES:
            raise ValueError(
                f'device must be one of {list(DEVICES)} (CUDA_VISIBLE_DEVICES chooses among '
                f'several GPUs), got {device!r}'
            )
        if device == 'cuda' and not torch.cuda.is_available():
            raise ValueError(
                f"device must be available here, got {device!r} without CUDA: use 'cpu'"
            )
        self.device = torch.device(device)
        self.spec, pruner = bundle.sampler(sampler)
        self.samplers = tuple(bundle.samplers)
        self.sampler = sampler
        self._network = bundle.network.to(self.device).eval().requires_grad_(False)
        self._pruner = pruner
        if pruner is not None:
            pruner.to(self.device).eval().requires_grad_(False)
        self._denoiser = self._network.denoiser
        observation, action = self.contract.observation, self.contract.action
        self._frames = FrameEncoder(self._network.observation_encoder, observation, self.device)
        joints = (1, observation.steps, len(observation.joints))
        self._joints = Upload(joints, torch.float32, self.device)
        chunk = (action.horizon, len(action.joints))
        self._committed = Upload(chunk, torch.float32, self.device)
        self._shares = Upload((action.horizon,), torch.float32, self.device)
        self._actions = Download(chunk, torch.float32, self.device)
        self._sampler = ChunkSampler(self._denoiser, self.spec, pruner, seed, engine)
        encoder = self._denoiser.spec.conditioner_flops(self.spec.scheduler.steps)
        self._fixed_flops = encoder
        self._dense_flops = encoder + flops.decoder_flops(self._denoiser.spec, self._sampler.dense)
        self._pruner_flops = flops.pruner_flops(pruner.spec) if pruner is not None else 0

    @classmethod
    def from_bundle(
        cls,
        path: str | Path,
        sampler: str | None = None,
        device: str = 'cpu',
        seed: int = 0,
        threads: int | None = None,
        engine: str = 'auto',
    ) -> TestTimeSparsePolicy:
        """Load a bundle folder; raises ValueError, or BundleError, which is one, with the reason.

        threads: torch threads of this process; None leaves them as they are. engine: see __init__.
        """
        if threads is not None:
            set_threads(threads)
        bundle = load_bundle(Path(path))
        return cls(bundle, sampler or bundle.default_sampler, device, seed, engine)

    @property
    def contract(self) -> PolicyContract:
        """What the policy sees and commands."""
        return self._network.contract

    @property
    def max_sparsity(self) -> float:
        """Largest sparsity this sampler takes; 0 without a pruner."""
        return self.spec.max_sparsity if self._pruner is not None else 0.0

    @property
    def recommended_sparsity(self) -> float:
        """The bundle's recommendation for this sampler."""
        return min(self.spec.recommended_sparsity, self.max_sparsity)

    def check_sparsity(self, value: Any) -> float:
        """Return the value as a float; raises ValueError naming the limit it breaks."""
        if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)):
            raise ValueError(f'sparsity must be a number, got {value!r}')
        if not 0.0 <= value <= self.max_sparsity + 1e-9:
            reason = (
                f'1 - 1/{self.spec.scheduler.steps} steps'
                if self._pruner is not None
                else 'the bundle has no pruner for it'
            )
            raise ValueError(
                f'sparsity must be in [0, {self.max_sparsity:.4g}] for sampler {self.sampler!r} '
                f'({reason}), got {value}'
            )
        return float(value)

    def reset(self, seed: int | None = None) -> None:
        """Start a new episode: forget all cached features, draw new noise.

        With a seed the episode's noise depends on it alone.
        """
        self._sampler.reset(seed)
        self._frames.clear()

    def _checked(
        self, window: Mapping[str, NDArray[Any]]
    ) -> tuple[dict[str, NDArray[Any]], NDArray[np.float32]]:
        """Images by camera and joints [To, J]."""
        observation = self.contract.observation
        expected = {'joints', *(camera.key for camera in observation.cameras)}
        if set(window) != expected:
            raise WindowError(f'window must hold {sorted(expected)}, got {sorted(window)}')
        images = {}
        for camera in observation.cameras:
            image = np.asarray(window[camera.key])
            shape = (observation.steps, camera.height, camera.width, 3)
            if image.shape != shape or image.dtype != np.uint8:
                raise WindowError(
                    f'{camera.key} must be uint8 {shape}, got {image.dtype} {image.shape}'
                )
            images[camera.key] = image
        joints = np.asarray(window['joints'], np.float32)
        expected_shape = (observation.steps, len(observation.joints))
        if joints.shape != expected_shape:
            raise WindowError(f'joints must be {expected_shape}, got {joints.shape}')
        if not np.isfinite(joints).all():
            raise WindowError('joints must be finite, got NaN or infinity')
        return images, joints

    @torch.inference_mode()
    def act(
        self,
        window: Mapping[str, NDArray[Any]],
        sparsity: float,
        committed: CommittedActions | None = None,
    ) -> Chunk:
        """Generate the chunk of one control tick.

        window: uint8 [To, H, W, 3] per camera and joints [To, J] in robot units, newest last.
        committed: actions that the chunk continues.

        Raises
        ------
        WindowError
            if the window does not meet the contract; nothing has changed then.
        ValueError
            if the sparsity is out of range, or committed actions do not fit; likewise.

        """
        sparsity = self.check_sparsity(sparsity)
        watch = Stopwatch()
        images, joints = self._checked(window)
        # A window that is refused leaves no upload behind, for nothing would wait for it.
        known = None if committed is None else self._known(committed)
        on_device = self._joints.send(joints[None])
        watch.lap('copy_in')
        normalised = self._network.joint_normalizer.normalize(on_device)
        features = self._network.observation_encoder.combine(self._frames(images), normalised)
        watch.lap('observation_encoder')
        x, plan, oldest = self._sampler.sample(features, sparsity, watch, known)
        # The one wait for the device, but for that of the plan.
        self._actions.start(self._network.action_normalizer.unnormalize(x[0]))
        actions = self._actions.wait()[self.contract.newest_action :].astype(np.float64)
        watch.lap('copy_out')
        stack = self._denoiser.spec.stack
        return Chunk(actions, plan, stack, self._stats(plan, oldest, watch))

    def _known(self, committed: CommittedActions) -> tuple[Tensor, Tensor]:
        """Normalised actions [T, A] and weights [T] over the horizon; raises ValueError."""
        usable = self.contract.usable_actions
        shape = (len(committed.weights), len(self.contract.action.joints))
        if committed.actions.shape != shape or len(committed.weights) > usable:
            raise ValueError(
                f'committed actions must be [n, {shape[1]}] with a weight each, n at most '
                f'{usable}, got {committed.actions.shape} and {committed.weights.shape}'
            )
        weights = committed.weights
        if not (np.isfinite(committed.actions).all() and ((weights >= 0) & (weights <= 1)).all()):
            raise ValueError('committed actions must be finite with weights in [0, 1]')
        horizon, first = self.contract.action.horizon, self.contract.newest_action
        actions, shares = np.zeros((horizon, shape[1])), np.zeros(horizon)
        held = slice(first, first + shape[0])
        actions[held], shares[held] = committed.actions, weights
        normalised = self._network.action_normalizer.normalize(self._committed.send(actions))
        return normalised, self._shares.send(shares)

    def _stats(self, plan: Plan, oldest: int, watch: Stopwatch) -> ChunkStats:
        pruned = plan is not self._sampler.dense
        executed = flops.decoder_flops(self._denoiser.spec, plan) + self._fixed_flops
        return ChunkStats(
            sparsity=realised_sparsity(plan),
            flops=executed + (self._pruner_flops if pruned else 0),
            dense_flops=self._dense_flops,
            latency_s=watch.total_s,
            stages_s=watch.stages_s,
            reuse_mix=reuse_mix(plan),
            oldest_rollout_ticks=oldest,
        )
