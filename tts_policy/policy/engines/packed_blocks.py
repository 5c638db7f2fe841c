# SPDX-License-Identifier: Apache-2.0
"""Residual blocks of the transformer denoiser, prepared once for fast execution on the CPU.

Every block is a function of the action tokens x [T, D] that writes its residual y [T, D].
- Linear layers are packed; query, key and value are one layer.
- Cross-attention never forms queries. With memory keys k_s and values v_s of a head,
  q(x) . k_s = x . (Wq^T k_s) and out(sum_s p_s v_s) = sum_s p_s (Wo v_s). So the few memory tokens
  go through Wq and Wo, not the action tokens: the time tokens of all steps when the engine is set
  up, the To observation tokens once a tick.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tts_policy.policy.denoisers.transformer import (
    ConditionalEncoder,
    CrossAttention,
    FeedForward,
    SelfAttention,
    TransformerDenoiser,
)

Linear = Callable[[Tensor], Tensor]
_HAS_FBGEMM = 'fbgemm' in torch.backends.quantized.supported_engines
_HAS_ONEDNN = torch.backends.mkldnn.is_available()


def pack_linear(weight: Tensor, bias: Tensor, rows: int) -> Linear:
    """Prepare y = x W^T + b, x [rows, in], float32, in the way that was measured to be fastest.

    Weights that half precision holds exactly, as those of every bundle, go to FBGEMM. It stores
    them in half precision and multiplies in float32: half the memory traffic, the same result.
    Other weights go to oneDNN, packed for that number of rows. Where torch was built without
    these, a matrix product serves.
    """
    weight, bias = weight.detach(), bias.detach()
    if _HAS_FBGEMM and torch.equal(weight, weight.half().float()):
        packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        multiply = torch.ops.quantized.linear_dynamic_fp16
        return lambda x: multiply(x, packed)
    if not _HAS_ONEDNN:
        transposed = weight.t().contiguous()
        return lambda x: torch.addmm(bias, x, transposed)
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    pointwise = torch.ops.mkldnn._linear_pointwise
    return lambda x: pointwise(x, reordered, bias, 'none', [], 'none')


def normalise(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Layer normalisation without the cost of a module call."""
    return torch.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def fold_norm(norm: nn.LayerNorm, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer that replaces `linear` and the affine part of `norm`."""
    weight = linear.weight * norm.weight
    return weight, linear.bias + linear.weight @ norm.bias


def additive(mask: Tensor) -> Tensor:
    """Boolean mask, True where attention is allowed, as a term of the scores."""
    return torch.zeros(mask.shape).masked_fill(~mask, float('-inf'))


class PackedSelfAttention:
    """Self-attention over action tokens."""

    def __init__(self, block: SelfAttention, mask: Tensor) -> None:
        rows, width = len(mask), block.out.in_features
        self._shape = (1, rows, 3, block.heads, width // block.heads)
        self._norm = block.norm
        self._qkv = pack_linear(block.qkv.weight, block.qkv.bias, rows)
        self._out = pack_linear(block.out.weight, block.out.bias, rows)
        self._mask = additive(mask)

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """Write the residual of x [T, D] to out [T, D]."""
        qkv = self._qkv(normalise(x, self._norm))
        q, k, v = qkv.view(self._shape).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask)
        out.copy_(self._out(y.transpose(1, 2).reshape(x.shape)))


class PackedFeedForward:
    """Feed-forward block."""

    def __init__(self, block: FeedForward, rows: int) -> None:
        self._norm = block.norm
        self._up = pack_linear(block.up.weight, block.up.bias, rows)
        self._down = pack_linear(block.down.weight, block.down.bias, rows)

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """Write the residual of x [T, D] to out [T, D]."""
        hidden = self._up(normalise(x, self._norm))
        out.copy_(self._down(F.gelu(hidden)))


class PackedEncoder:
    """Observation tokens of the conditional encoder."""

    def __init__(self, encoder: ConditionalEncoder, rows: int) -> None:
        up, self._act, down = encoder.mlp
        assert isinstance(up, nn.Linear) and isinstance(down, nn.Linear)
        self._input, self._up, self._down = (
            pack_linear(layer.weight, layer.bias, rows)
            for layer in (encoder.observation, up, down)
        )
        self._position = encoder.position[1:].detach()

    def __call__(self, features: Tensor) -> Tensor:
        """Observation features [To, Do] -> memory tokens [To, D]."""
        tokens = self._input(features).add_(self._position)
        return self._down(self._act(self._up(tokens)))


class FoldedMemory:
    """Keys and values of all layers, taken through the blocks' query and output projections.

    Each layer has buffers for keys and values [heads * S, D] and for the part of the scores that
    no action changes [T, heads * S], minus infinity where masked. S = 1 + To: `enter` writes the
    time token of a step, `observe` the observation tokens.
    """

    def __init__(self, denoiser: TransformerDenoiser, time_tokens: Tensor) -> None:
        spec, blocks = denoiser.spec, denoiser.cross_attentions
        layers, heads, width = spec.layers, spec.heads, spec.width
        self._sizes = (layers, heads, width // heads)
        mask = denoiser.memory_mask
        memory = mask.shape[1]
        self._kv = pack_linear(
            torch.cat([block.kv.weight for block in blocks]),
            torch.cat([block.kv.bias for block in blocks]),
            spec.obs_steps,
        )
        scale = (width // heads) ** -0.5
        queries = [fold_norm(block.norm, block.q) for block in blocks]
        # [L * heads, D / heads, D], from a head's key or value to the width of the tokens. They
        # are stored transposed, which makes the product with the few rows of a tick twice as fast.
        query = torch.cat([weight for weight, _ in queries]) * scale
        self._query = query.view(-1, width // heads, width).transpose(1, 2).contiguous().mT
        bias = torch.cat([bias for _, bias in queries]) * scale
        self._query_bias = bias.view(-1, width // heads, 1)
        out = torch.stack([block.out.weight for block in blocks])
        out = out.view(layers, width, heads, width // heads).transpose(1, 2)
        self._out = out.reshape(-1, width, width // heads).mT
        # Keys and values in one, so that a time token is entered by one copy.
        keys_values = torch.zeros(layers, 2, heads, memory, width)
        self._masked = additive(mask)[None, :, None, :].expand(layers, -1, heads, -1).contiguous()
        scores = self._masked.clone()
        self._observed, self._observed_scores = keys_values[..., 1:, :], scores[..., 1:]
        self.keys = [part[0].flatten(0, 1).t() for part in keys_values]
        self.values = [part[1].flatten(0, 1) for part in keys_values]
        self.scores = [part.flatten(1) for part in scores]
        self._slots = list(
            zip(keys_values[..., :1, :].unbind(0), scores[..., :1].unbind(0), strict=True)
        )
        folded = [self._fold(token[None]) for token in time_tokens]
        # By step and layer.
        self._time = [
            list(zip(kv.unbind(0), (self._masked[..., :1] + bias).unbind(0), strict=True))
            for kv, bias in folded
        ]

    def _fold(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Memory tokens [n, D] -> keys, values [L, 2, heads, n, D] and biases [L, 1, heads, n]."""
        layers, heads, size = self._sizes
        kv = self._kv(tokens).view(-1, layers, 2, heads, size).permute(2, 1, 3, 0, 4)
        keys, values = kv.reshape(2, layers * heads, -1, size).unbind(0)
        shape = (layers, heads, len(tokens), -1)
        folded = torch.bmm(keys, self._query).view(shape), torch.bmm(values, self._out).view(shape)
        bias = torch.bmm(keys, self._query_bias).view(layers, 1, heads, -1)
        return torch.stack(folded, dim=1), bias

    def observe(self, tokens: Tensor) -> None:
        """Write the observation tokens [To, D] of a tick."""
        keys_values, bias = self._fold(tokens)
        self._observed.copy_(keys_values)
        torch.add(self._masked[..., 1:], bias, out=self._observed_scores)

    def enter(self, step: int, layer: int) -> None:
        """Write the time token of a step for a layer."""
        for slot, value in zip(self._slots[layer], self._time[step][layer], strict=True):
            slot.copy_(value)


class PackedCrossAttention:
    """Cross-attention to a folded memory."""

    def __init__(self, block: CrossAttention, memory: FoldedMemory, layer: int, rows: int) -> None:
        self._norm, self._eps = (block.out.in_features,), block.norm.eps
        self._keys, self._values = memory.keys[layer], memory.values[layer]
        self._scores, self._bias = memory.scores[layer], block.out.bias
        self._buffer = torch.empty(self._scores.shape)
        self._heads = self._buffer.view(rows, block.heads, -1)
        self._weights = torch.empty(self._scores.shape)
        self._by_head = self._weights.view(rows, block.heads, -1)

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """Write the residual of x [T, D] to out [T, D]."""
        normed = torch.layer_norm(x, self._norm, eps=self._eps)
        torch.addmm(self._scores, normed, self._keys, out=self._buffer)
        torch.softmax(self._heads, -1, out=self._by_head)
        torch.addmm(self._bias, self._weights, self._values, out=out)
