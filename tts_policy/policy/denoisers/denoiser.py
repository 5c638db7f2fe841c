# SPDX-License-Identifier: Apache-2.0
"""What a denoiser is to everything else, and all architectures by name.

A denoiser is a list of residual blocks. Block b is a function y = f_b(x, conditioning), and the
caller adds y to x: the sparse engines can skip a block, or reuse an older y, without touching it.
Plans, caches and engines depend on nothing else of an architecture.

To add one, put a file beside this one that holds its module, a `Denoiser`, the options that a
bundle stores, and its sizes:

    @register_denoiser
    @checked('mine')
    class MineOptions(DenoiserOptions):
        gated: Flag = True

        def sized(self, **sizes: Any) -> MineSpec:
            return MineSpec(**sizes, **asdict(self))

    @checked('denoiser')
    class MineSpec(MineOptions, DenoiserSpec):
        def make(self) -> MineDenoiser:
            return MineDenoiser(self)

        ...  # the abstract properties of DenoiserSpec

Then `train_policy --denoiser mine gated=false` trains it, and model.yaml holds its options as
`network.mine`. `dit.py` is a short example.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from pydantic import model_validator
from torch import Tensor, nn
from typing_extensions import Self

from tts_policy.policy.denoisers.blocks import BlockStack
from tts_policy.policy.plan import Plan, Reuse
from tts_policy.policy.validation import Size, Spec, check_heads, checked

_Options = TypeVar('_Options', bound='type[DenoiserOptions]')


class DenoiserOptions(Spec, ABC):
    """What an architecture has beside its sizes; NAME is what bundles and commands call it."""

    @abstractmethod
    def sized(self, **sizes: Any) -> DenoiserSpec:
        """Sizes with these options; raises Mismatch for sizes the architecture cannot have."""


@checked('denoiser')
class DenoiserSpec(Spec, ABC):
    """Sizes: action dim A, horizon T, obs steps To, features Do, width D, layers L, heads."""

    action_dim: Size
    horizon: Size
    obs_steps: Size
    obs_features: Size
    width: Size = 256
    layers: Size = 8
    heads: Size = 4

    @model_validator(mode='after')
    def _check_heads(self) -> Self:
        check_heads(self.width, self.heads)
        return self

    @abstractmethod
    def make(self) -> Denoiser:
        """Make the module."""

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

    def decoder_flops(self, plan: Plan) -> int:
        """FLOPs of a plan [K, N]: its computed blocks, and embedding and head of every step.

        Two per multiply-add, by formula, because attention hides its work from torch's counter.
        Normalisation and activation are left out, as usual.
        """
        computed = (plan == Reuse.COMPUTE).sum(axis=0)
        return int(computed @ self.stack.flops) + len(plan) * self.step_flops


DENOISERS: dict[str, type[DenoiserOptions]] = {}


def register_denoiser(options: _Options) -> _Options:
    """Make an architecture known by the NAME of its options."""
    DENOISERS[options.NAME] = options
    return options


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
    def conditioning(self, step: int, block: int) -> Any:
        """Second argument of a block at a step."""


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
