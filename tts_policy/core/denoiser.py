# SPDX-License-Identifier: Apache-2.0
"""The denoising transformer of Diffusion Policy, written out as explicit residual blocks.

N = 3L residual blocks, b = 3l + j with j = 0 self-attention, 1 cross-attention, 2 feed-forward;
every block is a function y = f_b(x, conditioning) of its inputs and the caller adds y to x. That
is what lets the sparse engine skip a block or reuse an older y without touching the block.

Architecture: Chi et al., "Diffusion Policy" (RSS 2023), encoder-decoder transformer with time as
a condition token, pre-norm. `cond_layers` = 0: the conditional encoder is an MLP per token; more:
so many transformer encoder layers over all condition tokens. `causal`: self-attention looks back
only, and action token t sees observation tokens up to t; otherwise nothing is masked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BlockKind(IntEnum):
    """Kind j of a residual block; FORWARD reuse never crosses kinds."""

    SELF_ATTENTION = 0
    CROSS_ATTENTION = 1
    FEED_FORWARD = 2


@dataclass(frozen=True)
class DenoiserSpec:
    """Sizes: width D, layers L, heads, action dim A, horizon T, obs steps To, features Do.

    causal and cond_layers: see the module docstring.
    """

    action_dim: int
    horizon: int
    obs_steps: int
    obs_features: int
    width: int = 256
    layers: int = 8
    heads: int = 4
    causal: bool = True
    cond_layers: int = 0

    def __post_init__(self) -> None:
        """Refuse impossible sizes; raises ValueError naming the field."""
        if not isinstance(self.causal, bool):
            raise ValueError(f'denoiser causal must be true or false, got {self.causal!r}')
        for name, value in vars(self).items():
            if name == 'causal':
                continue
            low = 0 if name == 'cond_layers' else 1
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= 16384:
                raise ValueError(
                    f'denoiser {name} must be an integer in [{low}, 16384], got {value!r}'
                )
        if self.width % (2 * self.heads):
            raise ValueError(
                f'denoiser width must be a multiple of 2 x heads = {2 * self.heads}, '
                f'got {self.width}'
            )

    @property
    def blocks(self) -> int:
        """Number of residual blocks N."""
        return len(BlockKind) * self.layers


@dataclass(frozen=True)
class Conditioning:
    """What a block may read beside x: keys and values of the memory and the two masks.

    keys, values: [B, heads, 1 + To, D / heads] of this block's layer; self_mask [T, T] and
    memory_mask [T, 1 + To] are True where attention is allowed.
    """

    keys: Tensor
    values: Tensor
    self_mask: Tensor
    memory_mask: Tensor


def sinusoidal_embedding(positions: Tensor, width: int) -> Tensor:
    """Sines and cosines of positions [n] at wavelengths 2 pi to 20,000 pi, [n, width]."""
    half = width // 2
    exponent = torch.arange(half, device=positions.device, dtype=torch.float32) / (half - 1)
    angles = positions[:, None].float() * torch.exp(-math.log(10_000.0) * exponent)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """[..., S, D] -> [..., heads, S, D / heads]."""
    return tokens.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge_heads(tokens: Tensor) -> Tensor:
    """[..., heads, S, D / heads] -> [..., S, D]."""
    return tokens.transpose(-3, -2).flatten(-2)


class SelfAttention(nn.Module):
    """Multi-head self-attention, over the action tokens or the condition tokens."""

    kind = BlockKind.SELF_ATTENTION

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, cond: Conditioning | None = None) -> Tensor:
        """Residual y of tokens x [..., T, D]; without conditioning nothing is masked."""
        mask = None if cond is None else cond.self_mask
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (split_heads(part, self.heads) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(merge_heads(y))


class CrossAttention(nn.Module):
    """Multi-head attention of the action tokens to the memory, whose keys and values are given."""

    kind = BlockKind.CROSS_ATTENTION

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of memory tokens [..., S, D], each [..., heads, S, D / heads]."""
        k, v = self.kv(memory).chunk(2, dim=-1)
        return split_heads(k, self.heads), split_heads(v, self.heads)

    def forward(self, x: Tensor, cond: Conditioning) -> Tensor:
        """Residual y of action tokens x [B, T, D]."""
        q = split_heads(self.q(self.norm(x)), self.heads)
        y = F.scaled_dot_product_attention(q, cond.keys, cond.values, attn_mask=cond.memory_mask)
        return self.out(merge_heads(y))


class FeedForward(nn.Module):
    """Two linear layers with GELU, four times as wide inside."""

    kind = BlockKind.FEED_FORWARD

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, cond: Conditioning | None = None) -> Tensor:
        """Residual y of tokens x [..., T, D]."""
        return self.down(F.gelu(self.up(self.norm(x))))


class ConditionalEncoder(nn.Module):
    """Time and observation tokens to the memory that the decoder attends to, an MLP per token.

    A tick first forms time tokens, which no observation changes, and observation tokens, which no
    step changes; `mix` makes the memory of every step of them. Here they are the memory already.
    """

    mixes = False

    def __init__(self, spec: DenoiserSpec) -> None:
        super().__init__()
        self.width = spec.width
        self.observation = nn.Linear(spec.obs_features, spec.width)
        self.position = nn.Parameter(torch.zeros(1 + spec.obs_steps, spec.width))
        self.mlp = nn.Sequential(
            nn.Linear(spec.width, 4 * spec.width),
            nn.Mish(),
            nn.Linear(4 * spec.width, spec.width),
        )

    def time_tokens(self, timesteps: Tensor) -> Tensor:
        """Time tokens of timesteps [n] -> [n, D] (sinusoidal embedding)."""
        embedding = sinusoidal_embedding(timesteps, self.width)
        return self.mlp(embedding.to(self.position.dtype) + self.position[0])

    def observation_tokens(self, features: Tensor) -> Tensor:
        """Observation tokens of features [B, To, Do] -> [B, To, D]."""
        return self.mlp(self.observation(features) + self.position[1:])

    def mix(self, tokens: Tensor) -> Tensor:
        """Memory of time and observation tokens, both [..., 1 + To, D]."""
        return tokens


class AttentionEncoder(ConditionalEncoder):
    """Conditional encoder of `cond_layers` transformer layers: every step's memory differs."""

    mixes = True

    def __init__(self, spec: DenoiserSpec) -> None:
        super().__init__(spec)
        self.mlp = nn.Sequential()
        self.blocks = nn.ModuleList()
        for _ in range(spec.cond_layers):
            self.blocks.append(SelfAttention(spec.width, spec.heads))
            self.blocks.append(FeedForward(spec.width))

    def mix(self, tokens: Tensor) -> Tensor:
        """Memory of time and observation tokens, both [..., 1 + To, D]."""
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return tokens


class Denoiser(nn.Module):
    """Encoder-decoder transformer; see the module docstring."""

    self_mask: Tensor
    memory_mask: Tensor

    def __init__(self, spec: DenoiserSpec) -> None:
        super().__init__()
        self.spec = spec
        self.action = nn.Linear(spec.action_dim, spec.width)
        self.position = nn.Parameter(torch.zeros(spec.horizon, spec.width))
        self.encoder = AttentionEncoder(spec) if spec.cond_layers else ConditionalEncoder(spec)
        self.blocks = nn.ModuleList()
        for _ in range(spec.layers):
            self.blocks.append(SelfAttention(spec.width, spec.heads))
            self.blocks.append(CrossAttention(spec.width, spec.heads))
            self.blocks.append(FeedForward(spec.width))
        self.norm = nn.LayerNorm(spec.width)
        self.head = nn.Linear(spec.width, spec.action_dim)
        rows = torch.arange(spec.horizon)[:, None]
        memory_columns = torch.arange(1 + spec.obs_steps)[None, :]
        everything = torch.tensor(not spec.causal)
        self.register_buffer(
            'self_mask',
            (rows >= torch.arange(spec.horizon)[None, :]) | everything,
            persistent=False,
        )
        self.register_buffer(
            'memory_mask', (rows >= memory_columns - 1) | everything, persistent=False
        )
        self.apply(self._initialise)
        for parameter in (self.position, self.encoder.position):
            nn.init.normal_(parameter, std=0.02)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    @property
    def cross_attentions(self) -> list[CrossAttention]:
        """The cross-attention block of every layer, in order."""
        return [block for block in self.blocks if isinstance(block, CrossAttention)]

    def layer_blocks(self, layer: int) -> list[nn.Module]:
        """The residual blocks of one decoder layer, in order."""
        first = layer * len(BlockKind)
        return [self.blocks[first + j] for j in range(len(BlockKind))]

    def embed(self, noisy: Tensor) -> Tensor:
        """Noisy actions [B, T, A] -> action tokens [B, T, D]."""
        return self.action(noisy) + self.position

    def predict(self, x: Tensor) -> Tensor:
        """Action tokens after the last block [B, T, D] -> predicted noise or action [B, T, A]."""
        return self.head(self.norm(x))

    def conditioning(self, layer: int, memory: Tensor) -> Conditioning:
        """Conditioning of one layer's blocks from its memory [B, 1 + To, D]."""
        keys, values = self.cross_attentions[layer].keys_values(memory)
        return Conditioning(keys, values, self.self_mask, self.memory_mask)

    def forward(self, noisy: Tensor, timesteps: Tensor, features: Tensor) -> Tensor:
        """Predict noise or action of noisy [B, T, A] at timesteps [B], given features [B, To, Do].

        The plain path, as training uses it; sampling goes through the engine.
        """
        time = self.encoder.time_tokens(timesteps)[:, None]
        tokens = torch.cat([time, self.encoder.observation_tokens(features)], dim=1)
        memory = self.encoder.mix(tokens)
        x = self.embed(noisy)
        for layer in range(self.spec.layers):
            cond = self.conditioning(layer, memory)
            for block in self.layer_blocks(layer):
                x = x + block(x, cond)
        return self.predict(x)
