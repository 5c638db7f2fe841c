# SPDX-License-Identifier: Apache-2.0
"""What every denoiser is to the sparse engine: a declared list of residual blocks.

Block b is a function y = f_b(x, conditioning) of its inputs, and the caller adds y to x. That is
what lets the engine skip a block or reuse an older y without touching the block; nothing else in
the engine, the plans or the caches depends on the architecture. Implementations:
`transformer.TransformerDenoiser` (self-attention, cross-attention, feed-forward) and
`dit.DiTDenoiser` (modulated self-attention and feed-forward).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tts_policy.policy.denoisers.blocks import BlockStack
from tts_policy.policy.field_types import check_field_types


@dataclass(frozen=True)
class DenoiserSpec(ABC):
    """Sizes: width D, layers L, heads, action dim A, horizon T, obs steps To, features Do."""

    action_dim: int
    horizon: int
    obs_steps: int
    obs_features: int
    width: int = 256
    layers: int = 8
    heads: int = 4

    def __post_init__(self) -> None:
        """Refuse impossible sizes; raises ValueError naming the field."""
        for name in DenoiserSpec.__dataclass_fields__:
            self.check_size(name, low=1)
        check_field_types('denoiser', self)
        if self.width % (2 * self.heads):
            raise ValueError(
                f'denoiser width must be a multiple of 2 x heads = {2 * self.heads}, '
                f'got {self.width}'
            )

    def check_size(self, name: str, low: int) -> None:
        """Raise ValueError unless the field is an integer in [low, 16384]."""
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= 16384:
            raise ValueError(
                f'denoiser {name} must be an integer in [{low}, 16384], got {value!r}'
            )

    @property
    @abstractmethod
    def stack(self) -> BlockStack:
        """The residual blocks, in the order of execution."""

    @property
    def blocks(self) -> int:
        """Number of residual blocks N."""
        return len(self.stack)

    @property
    @abstractmethod
    def time_width(self) -> int:
        """Width of a time token that a pruner reads."""

    @property
    @abstractmethod
    def memory_width(self) -> int:
        """Width of an observation token that a pruner reads."""

    @property
    def step_flops(self) -> int:
        """FLOPs that every denoising step costs whatever its plan: embedding and head."""
        return 4 * self.horizon * self.width * self.action_dim

    @abstractmethod
    def conditioner_flops(self, steps: int) -> int:
        """FLOPs of encoding the observation of one tick for so many denoising steps."""


def row_of(table: Tensor, step: int | Tensor, dim: int = 0) -> Tensor:
    """Row of a step that the host knows, or that stands on the device as int64 [1]."""
    if isinstance(step, int):
        return table.select(dim, step)
    return table.index_select(dim, step).squeeze(dim)


class Conditioner(ABC):
    """What the blocks of a sampler's K steps read beside x: folded at load, encoded once a tick.

    It depends on step and observation, never on the noisy action. time_tokens: [K, .], constant;
    observation_tokens: [B, To, .] of the tick, after `encode`. A pruner reads these two.
    """

    time_tokens: Tensor
    observation_tokens: Tensor

    @abstractmethod
    def encode(self, features: Tensor) -> None:
        """Encode the observation features [B, To, Do] of a tick, for all steps and blocks."""

    @abstractmethod
    def conditioning(self, step: int | Tensor, block: int) -> Any:
        """Second argument of a block at a step; on the device, int64 [1], for captured graphs."""


class Denoiser(nn.Module, ABC):
    """Predicts noise, clean action or velocity through a stack of residual blocks.

    blocks: the N blocks of `spec.stack`; each maps tokens [B, T, D] and its conditioning to the
    residual y [B, T, D].
    """

    spec: DenoiserSpec
    blocks: nn.ModuleList

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    @abstractmethod
    def conditioner(self, timesteps: Sequence[float]) -> Conditioner:
        """Conditioner of a sampler that visits these timesteps [K]."""

    @abstractmethod
    def observation_tokens(self, features: Tensor) -> Tensor:
        """Tokens [B, To, .] that a pruner reads, of observation features [B, To, Do]."""

    @abstractmethod
    def embed(self, noisy: Tensor) -> Tensor:
        """Noisy actions [B, T, A] -> action tokens [B, T, D]."""

    @abstractmethod
    def predict(self, x: Tensor) -> Tensor:
        """Action tokens after the last block [B, T, D] -> the model's output [B, T, A]."""

    @abstractmethod
    def forward(self, noisy: Tensor, timesteps: Tensor, features: Tensor) -> Tensor:
        """Model output for noisy [B, T, A] at timesteps [B], given features [B, To, Do].

        The plain path, as training uses it; sampling goes through an engine.
        """
