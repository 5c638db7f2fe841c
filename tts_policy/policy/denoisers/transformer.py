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

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from tts_policy.policy.denoisers.attention import merge_heads, sinusoidal_embedding, split_heads
from tts_policy.policy.denoisers.blocks import (
    CROSS_ATTENTION,
    FEED_FORWARD,
    SELF_ATTENTION,
    BlockSpec,
    BlockStack,
)
from tts_policy.policy.denoisers.denoiser import (
    Conditioner,
    Denoiser,
    DenoiserOptions,
    DenoiserSpec,
    register_denoiser,
)
from tts_policy.policy.validation import Flag, Integer, Size, checked


@register_denoiser
@checked('transformer')
class TransformerOptions(DenoiserOptions):
    """What is masked and mixed: see the module docstring for causal and cond_layers."""

    causal: Flag = True
    cond_layers: Annotated[Integer, Field(ge=0, le=16384)] = 0

    def sized(self, **sizes: Any) -> TransformerSpec:
        """Sizes with these options."""
        return TransformerSpec(**sizes, **asdict(self))


@checked('denoiser')
class TransformerSpec(TransformerOptions, DenoiserSpec):
    """Sizes and options of a denoising transformer."""

    # The embedding of time has a wavelength for every pair of components, at least two.
    width: Annotated[Size, Field(ge=4)] = 256

    def make(self) -> TransformerDenoiser:
        """Make the module."""
        return TransformerDenoiser(self)

    @property
    def stack(self) -> BlockStack:
        """N = 3L residual blocks: self-attention, cross-attention, feed-forward in every layer."""
        return _stack(self)

    @property
    def time_width(self) -> int:
        """Width of a time token."""
        return self.width

    @property
    def memory_width(self) -> int:
        """Width of a token of the memory."""
        return self.width

    def conditioner_flops(self, steps: int) -> int:
        """FLOPs of one tick's memory with the keys and values of every layer.

        steps: denoising steps, each of which has its own memory where condition tokens are mixed.
        """
        width, tokens = self.width, 1 + self.obs_steps
        embedding = self.obs_steps * 2 * self.obs_features * width
        keys_values = self.layers * 4 * width**2
        if self.cond_layers == 0:
            return embedding + self.obs_steps * (16 * width * width + keys_values)
        layer = 24 * width * width + 4 * tokens * width
        return embedding + steps * tokens * (self.cond_layers * layer + keys_values)


@lru_cache
def _stack(spec: TransformerSpec) -> BlockStack:
    tokens, width, memory = spec.horizon, spec.width, 1 + spec.obs_steps
    linear = 2 * tokens * width * width
    attention = 4 * linear + 4 * tokens * tokens * width
    to_memory = 2 * linear + 4 * tokens * memory * width
    return BlockStack(
        tuple(
            block
            for layer in range(spec.layers)
            for block in (
                BlockSpec(SELF_ATTENTION, layer, attention),
                BlockSpec(CROSS_ATTENTION, layer, to_memory, conditioned=True),
                BlockSpec(FEED_FORWARD, layer, 8 * linear),
            )
        )
    )


@dataclass(frozen=True)
class Conditioning:
    """What cross-attention reads beside x: keys and values of the memory and the mask.

    keys, values: [B, heads, 1 + To, D / heads] of this block's layer; mask [T, 1 + To] is True
    where attention is allowed.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor


class SelfAttention(nn.Module):
    """Multi-head self-attention, over the action tokens or the condition tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Residual y of tokens x [..., T, D]; mask [T, T] is True where attention is allowed."""
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (split_heads(part, self.heads) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(merge_heads(y))


class CrossAttention(nn.Module):
    """Multi-head attention of the action tokens to the memory, whose keys and values are given."""

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
        y = F.scaled_dot_product_attention(q, cond.keys, cond.values, attn_mask=cond.mask)
        return self.out(merge_heads(y))


class FeedForward(nn.Module):
    """Two linear layers with GELU, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, cond: None = None) -> Tensor:
        """Residual y of tokens x [..., T, D]; nothing conditions it."""
        return self.down(F.gelu(self.up(self.norm(x))))


class ConditionalEncoder(nn.Module):
    """Time and observation tokens to the memory that the decoder attends to, an MLP per token.

    A tick first forms time tokens, which no observation changes, and observation tokens, which no
    step changes; `mix` makes the memory of every step of them. Here they are the memory already.
    """

    mixes = False

    def __init__(self, spec: TransformerSpec) -> None:
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

    def __init__(self, spec: TransformerSpec) -> None:
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


class ConditionalMemory(Conditioner):
    """The memory of a sampler's K steps: time tokens, and the observation tokens of this tick.

    With an MLP per token the keys and values of time tokens are computed once, when a sampler is
    set up, and those of the observation tokens once a tick. With attention between the tokens the
    memories of all steps differ; they are encoded in one batch.
    time_tokens: [K, D]; observation_tokens: [B, To, D] after `encode`.
    """

    def __init__(self, denoiser: TransformerDenoiser, timesteps: Sequence[float]) -> None:
        device = denoiser.device
        self._denoiser = denoiser
        self.time_tokens = denoiser.encoder.time_tokens(torch.tensor(timesteps, device=device))
        # [K, 1, D] -> per layer keys and values [K, heads, 1, D / heads]
        self._time = [
            block.keys_values(self.time_tokens[:, None]) for block in denoiser.cross_attentions
        ]
        # Per layer [B, heads, To, D / heads], or [B, K, heads, 1 + To, D / heads] where it mixes.
        self._tick: list[tuple[Tensor, Tensor]] = []
        self.observation_tokens = torch.empty(0, device=device)

    def encode(self, features: Tensor) -> None:
        """Encode the observation features [B, To, Do] of a tick, for all steps and layers."""
        denoiser = self._denoiser
        self.observation_tokens = denoiser.encoder.observation_tokens(features)
        tokens = self.rows() if denoiser.encoder.mixes else self.observation_tokens
        self._tick = [block.keys_values(tokens) for block in denoiser.cross_attentions]

    def conditioning(self, step: int, block: int) -> Conditioning | Tensor:
        """Keys and values for cross-attention, the mask for self-attention."""
        spec = self._denoiser.spec.stack.blocks[block]
        if spec.kind != CROSS_ATTENTION:
            return self._denoiser.self_mask
        return self.keys_values(step, spec.layer)

    def keys_values(self, step: int, layer: int) -> Conditioning:
        """Keys and values of one layer at one step."""
        keys, values = self._tick[layer]
        denoiser = self._denoiser
        if denoiser.encoder.mixes:
            keys, values = keys[:, step], values[:, step]
        else:
            time_keys, time_values = self._time[layer]
            batch = len(keys)
            times = time_keys[step], time_values[step]
            keys, values = (
                torch.cat([time.expand(batch, -1, -1, -1), part], dim=2)
                for time, part in zip(times, (keys, values), strict=True)
            )
        return Conditioning(keys, values, denoiser.memory_mask)

    def rows(self) -> Tensor:
        """The whole memory as the paper writes it: [B, K, 1 + To, D]."""
        batch, steps = len(self.observation_tokens), len(self.time_tokens)
        time = self.time_tokens[None, :, None].expand(batch, -1, -1, -1)
        observation = self.observation_tokens[:, None].expand(-1, steps, -1, -1)
        return self._denoiser.encoder.mix(torch.cat([time, observation], dim=2))


class TransformerDenoiser(Denoiser):
    """Encoder-decoder transformer; see the module docstring."""

    spec: TransformerSpec
    self_mask: Tensor
    memory_mask: Tensor

    def __init__(self, spec: TransformerSpec) -> None:
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
        stack = self.spec.stack.blocks
        return [self.blocks[b] for b, block in enumerate(stack) if block.layer == layer]

    def embed(self, noisy: Tensor) -> Tensor:
        """Noisy actions [B, T, A] -> action tokens [B, T, D]."""
        return self.action(noisy) + self.position

    def predict(self, x: Tensor) -> Tensor:
        """Action tokens after the last block [B, T, D] -> predicted noise or action [B, T, A]."""
        return self.head(self.norm(x))

    def conditioning(self, layer: int, memory: Tensor) -> Conditioning:
        """Conditioning of one layer's cross-attention from its memory [B, 1 + To, D]."""
        keys, values = self.cross_attentions[layer].keys_values(memory)
        return Conditioning(keys, values, self.memory_mask)

    def conditioner(self, timesteps: Sequence[float]) -> ConditionalMemory:
        """Conditional memory of a sampler that visits these timesteps [K]."""
        return ConditionalMemory(self, timesteps)

    def observation_tokens(self, features: Tensor) -> Tensor:
        """Observation tokens [B, To, D] of features [B, To, Do], before any mixing."""
        return self.encoder.observation_tokens(features)

    def forward(self, noisy: Tensor, timesteps: Tensor, features: Tensor) -> Tensor:
        """Model output for noisy [B, T, A] at timesteps [B], given features [B, To, Do]."""
        time = self.encoder.time_tokens(timesteps)[:, None]
        tokens = torch.cat([time, self.encoder.observation_tokens(features)], dim=1)
        memory = self.encoder.mix(tokens)
        x = self.embed(noisy)
        for layer in range(self.spec.layers):
            self_attention, cross_attention, feed_forward = self.layer_blocks(layer)
            x = x + self_attention(x, self.self_mask)
            x = x + cross_attention(x, self.conditioning(layer, memory))
            x = x + feed_forward(x)
        return self.predict(x)
