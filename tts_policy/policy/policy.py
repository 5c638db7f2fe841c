# SPDX-License-Identifier: Apache-2.0
"""The test-time sparse diffusion policy: an observation window in, an action chunk out.

`act` encodes the window, asks the pruner for a plan, denoises by the plan, and returns the chunk.
One policy object owns the state that survives a control tick, in a feature cache, and is used from
one thread. The first tick after `reset` is dense.
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

from tts_policy.policy.bundle import Bundle, load_bundle
from tts_policy.policy.chunk_sampler import ChunkSampler
from tts_policy.policy.contract import CommittedActions, PolicyContract
from tts_policy.policy.denoisers.blocks import BlockStack
from tts_policy.policy.device import Download, Upload, find_device, set_threads
from tts_policy.policy.engines.registry import AUTO
from tts_policy.policy.frame_encoder import FrameEncoder
from tts_policy.policy.plan import Plan, realised_sparsity, reuse_mix
from tts_policy.policy.stopwatch import Stopwatch


class WindowError(ValueError):
    """An observation window that does not meet the contract."""


@dataclass(frozen=True)
class ChunkStats:
    """What one chunk cost.

    sparsity: realised share of reused cells; flops: conditional encoder, pruner and executed
    decoder; dense_flops: conditional encoder and dense decoder; stages_s: host time of every
    stage (on a GPU that is launch time, and only latency_s is complete); oldest_rollout_ticks: age
    of the oldest feature of an earlier tick that was reused.
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
    """A bundle's policy, run by one of its samplers on one device."""

    __test__ = False  # the name starts with Test, but pytest has nothing to collect here

    def __init__(
        self,
        bundle: Bundle,
        sampler: str,
        device: str = 'cpu',
        seed: int = 0,
        engine: str = AUTO,
    ) -> None:
        """Set up buffers and tables; engine: see `engines.registry.find_engine`.

        Raises
        ------
        BundleError
            if the bundle has no such sampler.
        ValueError
            if the device is not available, or the engine cannot run the policy there.

        """
        self.device = find_device(device)
        self.spec, self._pruner = bundle.sampler(sampler)
        self.samplers, self.sampler = tuple(bundle.samplers), sampler
        self._network = bundle.network.to(self.device).eval().requires_grad_(False)
        if self._pruner is not None:
            self._pruner.to(self.device).eval().requires_grad_(False)
        self._allocate()
        denoiser = self._network.denoiser
        self._sampler = ChunkSampler(denoiser, self.spec, self._pruner, seed, engine)
        self._encoder_flops = denoiser.spec.conditioner_flops(self.spec.scheduler.steps)
        self._pruner_flops = self._pruner.spec.flops if self._pruner else 0

    def _allocate(self) -> None:
        observation, action = self.contract.observation, self.contract.action
        self._frames = FrameEncoder(self._network.observation_encoder, observation, self.device)
        joints = (1, observation.steps, len(observation.joints))
        self._joints = Upload(joints, torch.float32, self.device)
        chunk = (action.horizon, len(action.joints))
        self._committed = Upload(chunk, torch.float32, self.device)
        self._weights = Upload((action.horizon,), torch.float32, self.device)
        self._actions = Download(chunk, torch.float32, self.device)

    @classmethod
    def from_bundle(
        cls,
        path: str | Path,
        sampler: str | None = None,
        device: str = 'cpu',
        seed: int = 0,
        threads: int | None = None,
        engine: str = AUTO,
    ) -> TestTimeSparsePolicy:
        """Load a bundle folder; raises ValueError, or BundleError, which is one, with the reason.

        threads: torch threads of this process; None leaves them as they are.
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
            raise ValueError(f'sparsity: expected a number, got {value!r}')
        if not 0.0 <= value <= self.max_sparsity + 1e-9:
            reason = f'1 - 1/{self.spec.scheduler.steps} steps'
            if self._pruner is None:
                reason = 'the bundle has no pruner for it'
            raise ValueError(
                f'sparsity: expected a number in [0, {self.max_sparsity:.4g}] for sampler '
                f'{self.sampler!r} ({reason}), got {value}'
            )
        return float(value)

    def reset(self, seed: int | None = None) -> None:
        """Start an episode: forget all cached features and draw new noise.

        With a seed the episode's noise depends on the seed alone.
        """
        self._sampler.reset(seed)
        self._frames.clear()

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
        watch = Stopwatch()
        sparsity = self.check_sparsity(sparsity)
        images, joints = self._checked(window)
        # Everything is checked before the first upload: nothing waits for one of a refused window.
        known = None if committed is None else self._known(committed)
        on_device = self._joints.send(joints[None])
        watch.lap('copy_in')
        features = self._encode(images, on_device)
        watch.lap('observation_encoder')
        x, plan, oldest = self._sampler.sample(features, sparsity, watch, known)
        actions = self._robot_actions(x)
        watch.lap('copy_out')
        stack = self._network.denoiser.spec.stack
        return Chunk(actions, plan, stack, self._stats(plan, oldest, watch))

    def _checked(
        self, window: Mapping[str, NDArray[Any]]
    ) -> tuple[dict[str, NDArray[Any]], NDArray[np.float32]]:
        """Images by camera and joints [To, J]; raises WindowError."""
        observation = self.contract.observation
        expected = {'joints', *(camera.key for camera in observation.cameras)}
        if set(window) != expected:
            raise WindowError(f'window: expected {sorted(expected)}, got {sorted(window)}')
        images = {}
        for camera in observation.cameras:
            image = np.asarray(window[camera.key])
            shape = (observation.steps, camera.height, camera.width, 3)
            if image.shape != shape or image.dtype != np.uint8:
                raise WindowError(
                    f'{camera.key}: expected uint8 {shape}, got {image.dtype} {image.shape}'
                )
            images[camera.key] = image
        joints = np.asarray(window['joints'], np.float32)
        sizes = (observation.steps, len(observation.joints))
        if joints.shape != sizes:
            raise WindowError(f'joints: expected {sizes}, got {joints.shape}')
        if not np.isfinite(joints).all():
            raise WindowError('joints: expected finite positions, got NaN or infinity')
        return images, joints

    def _encode(self, images: Mapping[str, NDArray[Any]], joints: Tensor) -> Tensor:
        """Observation features [1, To, Do]."""
        normalised = self._network.joint_normalizer.normalize(joints)
        return self._network.observation_encoder.combine(self._frames(images), normalised)

    def _robot_actions(self, x: Tensor) -> NDArray[np.float64]:
        """Usable set-points [n, A] in robot units of normalised actions [1, T, A]."""
        self._actions.start(self._network.action_normalizer.unnormalize(x[0]))
        return self._actions.wait()[self.contract.newest_action :].astype(np.float64)

    def _known(self, committed: CommittedActions) -> tuple[Tensor, Tensor]:
        """Normalised actions [T, A] and weights [T] over the horizon; raises ValueError."""
        usable, weights = self.contract.usable_actions, committed.weights
        shape = (len(weights), len(self.contract.action.joints))
        if committed.actions.shape != shape or len(weights) > usable:
            raise ValueError(
                f'committed actions: expected [n, {shape[1]}] with a weight each, n at most '
                f'{usable}, got {committed.actions.shape} and {weights.shape}'
            )
        if not (np.isfinite(committed.actions).all() and ((weights >= 0) & (weights <= 1)).all()):
            raise ValueError(
                'committed actions: expected finite ones with weights in [0, 1], got others'
            )
        horizon, first = self.contract.action.horizon, self.contract.newest_action
        actions, padded_weights = np.zeros((horizon, shape[1])), np.zeros(horizon)
        held = slice(first, first + shape[0])
        actions[held], padded_weights[held] = committed.actions, weights
        normalised = self._network.action_normalizer.normalize(self._committed.send(actions))
        return normalised, self._weights.send(padded_weights)

    def _stats(self, plan: Plan, oldest: int, watch: Stopwatch) -> ChunkStats:
        spec, dense = self._network.denoiser.spec, self._sampler.dense
        pruner = 0 if plan is dense else self._pruner_flops
        return ChunkStats(
            sparsity=realised_sparsity(plan),
            flops=self._encoder_flops + pruner + spec.decoder_flops(plan),
            dense_flops=self._encoder_flops + spec.decoder_flops(dense),
            latency_s=watch.total_s,
            stages_s=watch.stages_s,
            reuse_mix=reuse_mix(plan),
            oldest_rollout_ticks=oldest,
        )
