# SPDX-License-Identifier: Apache-2.0
"""Weights of torch's transformer layers, by the names that our explicit blocks give them.

torch packs query, key and value of an attention into one matrix `in_proj_weight`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tts_policy.convert.weights import WeightSource
from tts_policy.policy.denoisers.transformer import TransformerSpec

Source = WeightSource[Any]


def self_attention(source: Source, attention: str, norm: str, target: str) -> dict[str, Tensor]:
    """Weights of a self-attention block and its norm."""
    return {
        f'{target}.qkv.weight': source.take(f'{attention}.in_proj_weight'),
        f'{target}.qkv.bias': source.take(f'{attention}.in_proj_bias'),
        **source.pair(f'{attention}.out_proj', f'{target}.out'),
        **source.pair(norm, f'{target}.norm'),
    }


def cross_attention(source: Source, attention: str, norm: str, target: str) -> dict[str, Tensor]:
    """Weights of a cross-attention block and its norm: queries apart from keys and values."""
    state = {
        **source.pair(f'{attention}.out_proj', f'{target}.out'),
        **source.pair(norm, f'{target}.norm'),
    }
    for part in ('weight', 'bias'):
        packed = source.take(f'{attention}.in_proj_{part}')
        width = len(packed) // 3
        state[f'{target}.q.{part}'] = packed[:width].clone()
        state[f'{target}.kv.{part}'] = packed[width:].clone()
    return state


def feed_forward(source: Source, layer: str, norm: str, target: str) -> dict[str, Tensor]:
    """Weights of a feed-forward block and its norm."""
    return {
        **source.pair(f'{layer}.linear1', f'{target}.up'),
        **source.pair(f'{layer}.linear2', f'{target}.down'),
        **source.pair(norm, f'{target}.norm'),
    }


def diffusion_transformer(source: Source, prefix: str, spec: TransformerSpec) -> dict[str, Tensor]:
    """State of our Denoiser from Diffusion Policy's TransformerForDiffusion under `prefix`.

    The position table is cut to the horizon, which is shorter than the table where only executed
    actions are predicted.
    """
    state = {
        **source.pair(f'{prefix}input_emb', 'action'),
        'position': source.take(f'{prefix}pos_emb')[0, : spec.horizon].clone(),
        **source.pair(f'{prefix}cond_obs_emb', 'encoder.observation'),
        'encoder.position': source.take(f'{prefix}cond_pos_emb')[0],
        **source.pair(f'{prefix}ln_f', 'norm'),
        **source.pair(f'{prefix}head', 'head'),
    }
    if spec.cond_layers == 0:
        state |= source.pair(f'{prefix}encoder.0', 'encoder.mlp.0')
        state |= source.pair(f'{prefix}encoder.2', 'encoder.mlp.2')
    for n in range(spec.cond_layers):
        layer = f'{prefix}encoder.layers.{n}'
        first, second = f'encoder.blocks.{2 * n}', f'encoder.blocks.{2 * n + 1}'
        state |= self_attention(source, f'{layer}.self_attn', f'{layer}.norm1', first)
        state |= feed_forward(source, layer, f'{layer}.norm2', second)
    for n in range(spec.layers):
        layer = f'{prefix}decoder.layers.{n}'
        targets = [f'blocks.{3 * n + kind}' for kind in range(3)]
        state |= self_attention(source, f'{layer}.self_attn', f'{layer}.norm1', targets[0])
        state |= cross_attention(source, f'{layer}.multihead_attn', f'{layer}.norm2', targets[1])
        state |= feed_forward(source, layer, f'{layer}.norm3', targets[2])
    masks = (f'{prefix}mask', f'{prefix}memory_mask', f'{prefix}_dummy_variable')
    source.ignore(lambda name: name in masks)
    return state
