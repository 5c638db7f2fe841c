# SPDX-License-Identifier: Apache-2.0
"""Weights of CLIP's vision transformer, under the names of transformers' CLIPVisionModel."""

from __future__ import annotations

import math
from itertools import count
from typing import Any

import torch
from torch import Tensor

from tts_policy.convert.restricted_pickle import CheckpointError
from tts_policy.convert.weights import WeightSource
from tts_policy.policy.contract import CameraSpec
from tts_policy.policy.encoders.vit import ViTSpec

Source = WeightSource[Any]
Size = tuple[int, int] | tuple[()]


def vit_spec(source: Source, prefix: str, camera: CameraSpec, resize: Size, crop: Size) -> ViTSpec:
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
            f'patch embedding must see square RGB patches, got {tuple(patches.shape)}'
        )
    side = patches.shape[2] * math.isqrt(max(len(positions) - 1, 0))
    seen = crop or resize or (camera.height, camera.width)
    if seen != (side, side):
        raise CheckpointError(
            f'camera {camera.key}: images of {side} x {side} expected after resize and crop, '
            f'got {seen[0]} x {seen[1]}'
        )
    layers = next(n for n in count() if f'{_layer(prefix, n)}.mlp.fc1.weight' not in source)
    if layers == 0:
        raise CheckpointError(f'weight {_layer(prefix, 0)}.mlp.fc1.weight expected, got nothing')
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
