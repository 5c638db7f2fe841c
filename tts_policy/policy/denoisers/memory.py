# SPDX-License-Identifier: Apache-2.0
"""Conditional encoding of all denoising steps at once.

With an MLP per token (cond_layers = 0) the memory of step i is [time token of t_i, observation
tokens]: time tokens and their cross-attention keys and values are folded at load, observation
tokens are encoded once a tick. With attention between the tokens (cond_layers > 0) the memories of
all steps differ and are encoded in one batch. `ConditionalMemory` hands every cross-attention its
keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tts_policy.policy.denoisers.blocks import CROSS_ATTENTION
from tts_policy.policy.denoisers.denoiser import Conditioner

if TYPE_CHECKING:
    from tts_policy.policy.denoisers.transformer import TransformerDenoiser


@dataclass(frozen=True)
class Conditioning:
    """What cross-attention reads beside x: keys and values of the memory and the mask.

    keys, values: [B, heads, 1 + To, D / heads] of this block's layer; mask [T, 1 + To] is True
    where attention is allowed.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor


class ConditionalMemory(Conditioner):
    """Folded time tokens of a sampler's K steps, and the observation tokens of the current tick.

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
