# SPDX-License-Identifier: Apache-2.0
"""CLIP's text encoder, run once while a checkpoint is converted: a robot has one instruction.

Tokens up to the first end of text are enough: attention is causal, and the feature of a text is
that of its end. Source: Radford et al., "Learning Transferable Visual Models From Natural Language
Supervision" (2021); key names are those of transformers' CLIPTextModel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tts_policy.convert.restricted_pickle import CheckpointError
from tts_policy.convert.weights import WeightSource
from tts_policy.policy.denoisers.attention import merge_heads, split_heads
from tts_policy.policy.encoders.vit import HEAD_WIDTH, quick_gelu

START_OF_TEXT, END_OF_TEXT = 49406, 49407
MAX_LAYERS = 64
Source = WeightSource[Any]


def _linear(source: Source, name: str, x: Tensor) -> Tensor:
    weight, bias = source.take(f'{name}.weight'), source.take(f'{name}.bias')
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1] or bias.shape != weight.shape[:1]:
        raise CheckpointError(
            f'weight {name} must map {x.shape[-1]} values, got {tuple(weight.shape)}'
        )
    return F.linear(x, weight, bias)


def _norm(source: Source, name: str, x: Tensor) -> Tensor:
    weight, bias = source.take(f'{name}.weight'), source.take(f'{name}.bias')
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise CheckpointError(
            f'weight {name} must have {x.shape[-1]} values, got {tuple(weight.shape)}'
        )
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def _embedded(source: Source, prefix: str, tokens: Sequence[int]) -> Tensor:
    """Tokens up to the end of the text as vectors [S, D]."""
    table = source.take(f'{prefix}embeddings.token_embedding.weight')
    positions = source.take(f'{prefix}embeddings.position_embedding.weight')
    if END_OF_TEXT not in tokens or tokens[0] != START_OF_TEXT:
        raise CheckpointError(
            f'instruction tokens must begin with {START_OF_TEXT} and end with {END_OF_TEXT}, '
            f'got {list(tokens)[:8]}'
        )
    text = torch.tensor(tokens[: tokens.index(END_OF_TEXT) + 1])
    if not 0 <= int(text.min()) <= int(text.max()) < len(table) or len(text) > len(positions):
        raise CheckpointError(
            f'instruction must have at most {len(positions)} tokens, each in [0, {len(table)}), '
            f'got {len(text)} up to {int(text.max())}'
        )
    if table.ndim != 2 or positions.ndim != 2 or table.shape[1] != positions.shape[1]:
        raise CheckpointError(f'token and position embeddings of {prefix} must be of one width')
    if table.shape[1] % HEAD_WIDTH:
        raise CheckpointError(
            f'text encoder must be a multiple of {HEAD_WIDTH} wide, got {table.shape[1]}'
        )
    return table[text] + positions[: len(text)]


def text_feature(source: Source, prefix: str, tokens: Sequence[int]) -> Tensor:
    """Feature [D] of an instruction; `prefix` leads to `embeddings` and `encoder`.

    Raises
    ------
    CheckpointError
        for weights that are no such encoder, and tokens that are no text of it.

    """
    x = _embedded(source, prefix, tokens)
    heads = x.shape[-1] // HEAD_WIDTH
    for layer in range(MAX_LAYERS):
        name = f'{prefix}encoder.layers.{layer}'
        if f'{name}.layer_norm1.weight' not in source:
            break
        normed = _norm(source, f'{name}.layer_norm1', x)
        q, k, v = (
            split_heads(_linear(source, f'{name}.self_attn.{part}_proj', normed), heads)
            for part in 'qkv'
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + _linear(source, f'{name}.self_attn.out_proj', merge_heads(mixed))
        inner = _linear(source, f'{name}.mlp.fc1', _norm(source, f'{name}.layer_norm2', x))
        x = x + _linear(source, f'{name}.mlp.fc2', quick_gelu(inner))
    return _norm(source, f'{prefix}final_layer_norm', x)[-1]
