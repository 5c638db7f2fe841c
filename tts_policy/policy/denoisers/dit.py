# SPDX-License-Identifier: Apache-2.0
"""A diffusion transformer (DiT) whose blocks are modulated by time and observation (adaLN-zero).

N = 2L residual blocks, self-attention and feed-forward in turn, y = gate * f(norm(x) * (1 + scale)
+ shift); shift, scale and gate are a linear map of SiLU([time features, observation features]).
The gate belongs to the block: y, gate included, is what the caches hold, so that equal sources
mean equal sums whatever the step, and a run of reused blocks stays one addition.

The map is linear after the SiLU, so its part for the time is folded at load for all K steps, and
its part for the observation is one product per block and tick.
Sources: Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023); sizes, positions and
conditioning are those of LeRobot's multi-task DiT policy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tts_policy.policy.denoisers.attention import merge_heads, rotary_angles, rotate, split_heads
from tts_policy.policy.denoisers.attention import sinusoidal_embedding as embedding
from tts_policy.policy.denoisers.blocks import FEED_FORWARD, SELF_ATTENTION, BlockSpec, BlockStack
from tts_policy.policy.denoisers.denoiser import (
    Conditioner,
    Denoiser,
    DenoiserOptions,
    DenoiserSpec,
    register_denoiser,
)
from tts_policy.policy.validation import Flag, Integer, Number, checked


@register_denoiser
@checked('dit')
class DiTOptions(DenoiserOptions):
    """Options; time_features: width of the time's features.

    rotary: queries and keys are turned by position, at base rotary_base; learned_position: a
    learned vector per position is added to the action tokens.
    """

    time_features: Annotated[Integer, Field(ge=4, le=16384, multiple_of=2)] = 256
    rotary: Flag = True
    rotary_base: Annotated[Number, Field(gt=1.0, le=1e9)] = 10_000.0
    learned_position: Flag = False

    def sized(self, **sizes: Any) -> DiTSpec:
        """Sizes with these options."""
        return DiTSpec(**sizes, **asdict(self))


@checked('denoiser')
class DiTSpec(DiTOptions, DenoiserSpec):
    """Sizes and options of a diffusion transformer."""

    def make(self) -> DiTDenoiser:
        """Make the module."""
        return DiTDenoiser(self)

    @property
    def stack(self) -> BlockStack:
        """N = 2L residual blocks, all of them modulated."""
        return _stack(self)

    @property
    def time_width(self) -> int:
        """Width of the time features."""
        return self.time_features

    @property
    def memory_width(self) -> int:
        """Width of an observation's features."""
        return self.obs_features

    def conditioner_flops(self, steps: int) -> int:
        """FLOPs of one tick's modulations: the observation's part, once for all steps."""
        return self.blocks * 2 * self.obs_steps * self.obs_features * 3 * self.width


@lru_cache
def _stack(spec: DiTSpec) -> BlockStack:
    linear = 2 * spec.horizon * spec.width * spec.width
    attention = 4 * linear + 4 * spec.horizon * spec.horizon * spec.width
    return BlockStack(
        tuple(
            block
            for layer in range(spec.layers)
            for block in (
                BlockSpec(SELF_ATTENTION, layer, attention, conditioned=True),
                BlockSpec(FEED_FORWARD, layer, 8 * linear, conditioned=True),
            )
        )
    )


@dataclass(frozen=True)
class Modulation:
    """Shift, scale and gate of a block at a step, each [B, 1, D]."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class ModulatedBlock(nn.Module, ABC):
    """y = gate * f(norm(x) * (1 + scale) + shift); a subclass is f."""

    def __init__(self, spec: DiTSpec) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(spec.width, eps=1e-6, elementwise_affine=False)
        inputs = spec.time_features + spec.obs_steps * spec.obs_features
        self.modulation = nn.Linear(inputs, 3 * spec.width)

    @abstractmethod
    def branch(self, x: Tensor) -> Tensor:
        """f of modulated tokens [B, T, D]."""

    def forward(self, x: Tensor, cond: Modulation) -> Tensor:
        """Residual y of action tokens x [B, T, D]."""
        modulated = self.norm(x) * (1 + cond.scale) + cond.shift
        return cond.gate * self.branch(modulated)


class ModulatedAttention(ModulatedBlock):
    """Multi-head self-attention without a mask."""

    angles: Tensor

    def __init__(self, spec: DiTSpec) -> None:
        super().__init__(spec)
        self.heads, self.rotary = spec.heads, spec.rotary
        self.qkv = nn.Linear(spec.width, 3 * spec.width)
        self.out = nn.Linear(spec.width, spec.width)
        angles = rotary_angles(spec.horizon, spec.width // spec.heads, spec.rotary_base)
        self.register_buffer('angles', angles, persistent=False)

    def branch(self, x: Tensor) -> Tensor:
        """Attention over action tokens [B, T, D]."""
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        if self.rotary:
            q, k = rotate(q, self.angles), rotate(k, self.angles)
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v)))


class ModulatedFeedForward(ModulatedBlock):
    """Two linear layers with GELU in its tanh form, four times as wide inside."""

    def __init__(self, spec: DiTSpec) -> None:
        super().__init__(spec)
        self.up = nn.Linear(spec.width, 4 * spec.width)
        self.down = nn.Linear(4 * spec.width, spec.width)

    def branch(self, x: Tensor) -> Tensor:
        """Map every token of [B, T, D]."""
        return self.down(F.gelu(self.up(x), approximate='tanh'))


class ModulationTable(Conditioner):
    """Shift, scale and gate of every step and block; see the module docstring."""

    def __init__(self, denoiser: DiTDenoiser, timesteps: Sequence[float]) -> None:
        self._denoiser = denoiser
        self.time_tokens = denoiser.time_features(torch.tensor(timesteps, device=denoiser.device))
        split = denoiser.spec.time_features
        time = F.silu(self.time_tokens)
        self._time = [
            F.linear(time, layer.weight[:, :split], layer.bias) for layer in denoiser.modulations
        ]
        self._observation = [layer.weight[:, split:] for layer in denoiser.modulations]
        self._tick: list[Tensor] = []
        self.observation_tokens = torch.empty(0, device=denoiser.device)

    def encode(self, features: Tensor) -> None:
        """Encode the observation features [B, To, Do] of a tick, for all steps and blocks."""
        self.observation_tokens = self._denoiser.observation_tokens(features)
        activated = F.silu(features.flatten(1))
        self._tick = [F.linear(activated, weight) for weight in self._observation]

    def conditioning(self, step: int, block: int) -> Modulation:
        """Modulation of a block at a step."""
        both = self._time[block][step] + self._tick[block]
        return Modulation(*both[:, None].chunk(3, dim=-1))


class DiTDenoiser(Denoiser):
    """Diffusion transformer; see the module docstring."""

    spec: DiTSpec

    def __init__(self, spec: DiTSpec) -> None:
        super().__init__()
        self.spec = spec
        self.action = nn.Linear(spec.action_dim, spec.width)
        self.position = (
            nn.Parameter(0.02 * torch.randn(spec.horizon, spec.width))
            if spec.learned_position
            else None
        )
        wide = 2 * spec.time_features
        self.time = nn.Sequential(
            nn.Linear(spec.time_features, wide),
            nn.GELU(),
            nn.Linear(wide, spec.time_features),
            nn.GELU(),
        )
        self.blocks = nn.ModuleList()
        for _ in range(spec.layers):
            self.blocks.append(ModulatedAttention(spec))
            self.blocks.append(ModulatedFeedForward(spec))
        self.head = nn.Linear(spec.width, spec.action_dim)
        for modulation in self.modulations:
            nn.init.zeros_(modulation.weight)
            nn.init.zeros_(modulation.bias)

    @property
    def modulations(self) -> list[nn.Linear]:
        """The map to shift, scale and gate of every block."""
        return [block.modulation for block in self.blocks if isinstance(block, ModulatedBlock)]

    def time_features(self, timesteps: Tensor) -> Tensor:
        """Features [n, E] of timesteps [n]."""
        return self.time(embedding(timesteps, self.spec.time_features))

    def conditioner(self, timesteps: Sequence[float]) -> ModulationTable:
        """Modulations of a sampler that visits these timesteps [K]."""
        return ModulationTable(self, timesteps)

    def observation_tokens(self, features: Tensor) -> Tensor:
        """The features [B, To, Do] themselves: what modulates is what a pruner reads."""
        return features

    def embed(self, noisy: Tensor) -> Tensor:
        """Noisy actions [B, T, A] -> action tokens [B, T, D]."""
        tokens = self.action(noisy)
        return tokens if self.position is None else tokens + self.position

    def predict(self, x: Tensor) -> Tensor:
        """Action tokens after the last block [B, T, D] -> the model's output [B, T, A]."""
        return self.head(x)

    def forward(self, noisy: Tensor, timesteps: Tensor, features: Tensor) -> Tensor:
        """Model output for noisy [B, T, A] at timesteps [B], given features [B, To, Do]."""
        both = torch.cat([self.time_features(timesteps), features.flatten(1)], dim=-1)
        activated = F.silu(both)
        x = self.embed(noisy)
        for block, modulation in zip(self.blocks, self.modulations, strict=True):
            cond = Modulation(*modulation(activated)[:, None].chunk(3, dim=-1))
            x = x + block(x, cond)
        return self.predict(x)
