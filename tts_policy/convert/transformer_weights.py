# SPDX-License-Identifier: Apache-2.0
"""Weights of torch's transformer layers under our names: Diffusion Policy's denoiser, the pruner.

torch packs query, key and value of an attention into one matrix `in_proj_weight`. Pruner
checkpoints of the paper's code (pruner_model_*.pt and final_pruner.pth, arXiv 2605.13316) hold
the weights as `model_state_dict` beside the sizes.
"""

from __future__ import annotations

from torch import Tensor

from tts_policy.convert.checkpoint import Checkpoint, load_state
from tts_policy.convert.checkpoint import WeightSource as Source
from tts_policy.convert.restricted_pickle import CheckpointError
from tts_policy.policy.denoisers.transformer import TransformerSpec
from tts_policy.policy.plan import Reuse
from tts_policy.policy.query_pruner import QueryPruner, QueryPrunerSpec
from tts_policy.policy.validation import quoted


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


def read_pruner(checkpoint: Checkpoint, denoiser: TransformerSpec, steps: int) -> QueryPruner:
    """Pruner of a denoiser for a sampler of `steps` steps.

    Raises
    ------
    CheckpointError
        if it is no such pruner, was made for another denoiser or has another number of classes.

    """
    data = checkpoint.data
    if not isinstance(data, dict) or 'model_state_dict' not in data:
        raise CheckpointError('pruner: expected model_state_dict, got another kind of checkpoint')
    if denoiser.cond_layers:
        raise CheckpointError(
            f'n_cond_layers: expected 0 of a policy with a pruner, got {denoiser.cond_layers}'
        )
    source = checkpoint.weights(data['model_state_dict'], 'model_state_dict')
    head, memory = source.pair('head', 'head'), source.pair('memory_proj', 'memory')
    if len(head['head.bias']) != len(Reuse):
        raise CheckpointError(
            f'pruner: expected {len(Reuse)} classes, got {len(head["head.bias"])}'
        )
    width, memory_width = memory['memory.weight'].shape
    if memory_width != denoiser.width:
        raise CheckpointError(
            f'pruner: expected a memory of width {denoiser.width}, got {memory_width}'
        )
    heads = data.get('attn_heads')
    if type(heads) is not int:
        raise CheckpointError(f'attn_heads: expected an integer, got {quoted(heads)}')
    layer = 'transformer_decoder.layers.0'
    state = {
        **head,
        **memory,
        **self_attention(source, f'{layer}.self_attn', f'{layer}.norm1', 'self_attention'),
        **cross_attention(source, f'{layer}.multihead_attn', f'{layer}.norm2', 'cross_attention'),
        **source.pair(f'{layer}.norm3', 'norm'),
        **source.pair(f'{layer}.linear1', 'up'),
        **source.pair(f'{layer}.linear2', 'down'),
    }
    source.require_empty()
    spec = QueryPrunerSpec(
        steps=steps,
        blocks=denoiser.blocks,
        memory_width=memory_width,
        obs_steps=denoiser.obs_steps,
        width=width,
        heads=heads,
        feed_forward=len(state['up.bias']),
    )
    pruner = QueryPruner(spec)
    load_state(pruner, state)
    return pruner
