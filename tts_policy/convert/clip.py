# SPDX-License-Identifier: Apache-2.0
"""CLIP's encoders under the names of transformers' CLIPTextModel and CLIPVisionModel.

The text encoder runs once, during conversion, because a robot has one instruction. It needs the
tokens up to the first end of text only: attention is causal, and the feature of a text is that of
its end. The vision encoder is one of ours; here are its sizes and weights.
Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision"
(2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count

import torch
from torch import Tensor
from torch.nn import functional as F

from tts_policy.convert.checkpoint import WeightSource as Source
from tts_policy.convert.restricted_pickle import CheckpointError
from tts_policy.policy.contract import CameraSpec
from tts_policy.policy.denoisers.attention import merge_heads, split_heads
from tts_policy.policy.encoders.vit import HEAD_WIDTH, ViTSpec, quick_gelu

START_OF_TEXT, END_OF_TEXT = 49406, 49407
MAX_LAYERS = 64


def _linear(source: Source, name: str, x: Tensor) -> Tensor:
    weight, bias = source.take(f'{name}.weight'), source.take(f'{name}.bias')
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1] or bias.shape != weight.shape[:1]:
        raise CheckpointError(
            f'{name}: expected a map of {x.shape[-1]} values, got {tuple(weight.shape)}'
        )
    return F.linear(x, weight, bias)


def _norm(source: Source, name: str, x: Tensor) -> Tensor:
    weight, bias = source.take(f'{name}.weight'), source.take(f'{name}.bias')
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise CheckpointError(f'{name}: expected {x.shape[-1]} values, got {tuple(weight.shape)}')
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def _embedded(source: Source, prefix: str, tokens: Sequence[int]) -> Tensor:
    """Tokens up to the end of the text as vectors [S, D]."""
    table = source.take(f'{prefix}embeddings.token_embedding.weight')
    positions = source.take(f'{prefix}embeddings.position_embedding.weight')
    if END_OF_TEXT not in tokens or tokens[0] != START_OF_TEXT:
        raise CheckpointError(
            f'instruction tokens: expected {START_OF_TEXT} first and {END_OF_TEXT} last, '
            f'got {list(tokens)[:8]}'
        )
    text = torch.tensor(tokens[: tokens.index(END_OF_TEXT) + 1])
    if not 0 <= int(text.min()) <= int(text.max()) < len(table) or len(text) > len(positions):
        raise CheckpointError(
            f'instruction: expected at most {len(positions)} tokens, each in [0, {len(table)}), '
            f'got {len(text)} up to {int(text.max())}'
        )
    if table.ndim != 2 or positions.ndim != 2 or table.shape[1] != positions.shape[1]:
        raise CheckpointError(
            f'{prefix}embeddings: expected tokens and positions of one width, got two'
        )
    if table.shape[1] % HEAD_WIDTH:
        raise CheckpointError(
            f'text encoder: expected a width that is a multiple of {HEAD_WIDTH}, '
            f'got {table.shape[1]}'
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


def vit_spec(
    source: Source, prefix: str, camera: CameraSpec, resize: tuple[int, ...], crop: tuple[int, ...]
) -> ViTSpec:
    """Sizes of the encoder under `prefix`, read off its weights.

    Raises
    ------
    CheckpointError
        for weights that are no such encoder, or one of images of another size.

    """
    patches = source.take(f'{prefix}embeddings.patch_embedding.weight')
    positions = source.take(f'{prefix}embeddings.position_embedding.weight')
    if patches.ndim != 4 or patches.shape[1] != 3 or patches.shape[2] != patches.shape[3]:
        raise CheckpointError(
            f'patch embedding: expected square RGB patches, got {tuple(patches.shape)}'
        )
    side = patches.shape[2] * math.isqrt(max(len(positions) - 1, 0))
    seen = crop or resize or (camera.height, camera.width)
    if seen != (side, side):
        raise CheckpointError(
            f'camera {camera.key}: expected images of {side} x {side} after resize and crop, '
            f'got {seen[0]} x {seen[1]}'
        )
    layers = next(n for n in count() if f'{_layer(prefix, n)}.mlp.fc1.weight' not in source)
    if layers == 0:
        raise CheckpointError(
            f'{_layer(prefix, 0)}.mlp.fc1.weight: expected a weight, got nothing'
        )
    hidden = len(source.take(f'{_layer(prefix, 0)}.mlp.fc1.weight'))
    return ViTSpec(len(patches), layers, hidden, patches.shape[2], resize, crop)


def vit_state(source: Source, prefix: str, spec: ViTSpec) -> dict[str, Tensor]:
    """State of our VisionTransformer, without its pixel normaliser."""
    state = {
        'patches.weight': source.take(f'{prefix}embeddings.patch_embedding.weight'),
        'class_token': source.take(f'{prefix}embeddings.class_embedding'),
        'positions': source.take(f'{prefix}embeddings.position_embedding.weight'),
        # The name is misspelt in transformers.
        **source.pair(f'{prefix}pre_layrnorm', 'norm'),
    }
    for n in range(spec.layers):
        name, target = _layer(prefix, n), f'blocks.{n}'
        for part in ('weight', 'bias'):
            state[f'{target}.qkv.{part}'] = torch.cat(
                [source.take(f'{name}.self_attn.{which}_proj.{part}') for which in 'qkv']
            )
        for theirs, ours in (
            ('self_attn.out_proj', 'out'),
            ('layer_norm1', 'norm1'),
            ('layer_norm2', 'norm2'),
            ('mlp.fc1', 'up'),
            ('mlp.fc2', 'down'),
        ):
            state |= source.pair(f'{name}.{theirs}', f'{target}.{ours}')
    # Applied to what transformers pools, which the policy does not use.
    source.ignore(lambda name: name.startswith(f'{prefix}post_layernorm.'))
    return state


def _layer(prefix: str, number: int) -> str:
    return f'{prefix}encoder.layers.{number}'
