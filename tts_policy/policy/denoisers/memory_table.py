# SPDX-License-Identifier: Apache-2.0
"""Keys and values of all denoising steps and layers in one tensor that never moves.

`ConditionalMemory` joins them block by block; here one look-up gives those of a layer at a step
that stands on the device, and a kernel can read the tensor as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tts_policy.policy.denoisers.attention import split_heads
from tts_policy.policy.denoisers.blocks import CROSS_ATTENTION
from tts_policy.policy.denoisers.denoiser import Conditioner, row_of
from tts_policy.policy.denoisers.memory import Conditioning
from tts_policy.policy.denoisers.transformer import TransformerDenoiser


class MemoryTable(Conditioner):
    """Conditioner of a batch of one; keys_values: [K, 1 + To, L, 2, D] after `encode`."""

    def __init__(self, denoiser: TransformerDenoiser, timesteps: Sequence[float]) -> None:
        spec, device = denoiser.spec, denoiser.device
        self._denoiser = denoiser
        crosses = denoiser.cross_attentions
        self._weight = torch.cat([block.kv.weight for block in crosses])
        self._bias = torch.cat([block.kv.bias for block in crosses])
        self.time_tokens = denoiser.encoder.time_tokens(torch.tensor(timesteps, device=device))
        self.observation_tokens = torch.zeros(1, spec.obs_steps, spec.width, device=device)
        self.keys_values = torch.zeros(
            len(timesteps), 1 + spec.obs_steps, spec.layers, 2, spec.width, device=device
        )
        self.keys_values[:, 0] = self._project(self.time_tokens)

    def _project(self, tokens: Tensor) -> Tensor:
        """Memory tokens [..., D] -> keys and values of all layers [..., L, 2, D]."""
        return F.linear(tokens, self._weight, self._bias).unflatten(-1, self.keys_values.shape[2:])

    def encode(self, features: Tensor) -> None:
        """Encode the observation features [1, To, Do] of a tick."""
        encoder = self._denoiser.encoder
        self.observation_tokens.copy_(encoder.observation_tokens(features))
        if encoder.mixes:
            steps = len(self.time_tokens)
            observation = self.observation_tokens.expand(steps, -1, -1)
            tokens = torch.cat([self.time_tokens[:, None], observation], dim=1)
            self.keys_values.copy_(self._project(encoder.mix(tokens)))
        else:
            self.keys_values[:, 1:].copy_(self._project(self.observation_tokens))

    def conditioning(self, step: int | Tensor, block: int) -> Conditioning | Tensor:
        """Keys and values for cross-attention, the mask for self-attention."""
        denoiser = self._denoiser
        spec = denoiser.spec.stack.blocks[block]
        if spec.kind != CROSS_ATTENTION:
            return denoiser.self_mask
        row = row_of(self.keys_values[:, :, spec.layer], step)[None]
        keys, values = (split_heads(part, denoiser.spec.heads) for part in row.unbind(2))
        return Conditioning(keys, values, denoiser.memory_mask)
