# SPDX-License-Identifier: Apache-2.0
"""Pruner checkpoints of the paper's code: pruner_model_*.pt and final_pruner.pth.

They hold the weights as `model_state_dict` beside sizes and, from validation, the share of cells
that was reused. Source: the code published with arXiv 2605.13316.
"""

from __future__ import annotations

from tts_policy.convert.checkpoint import Checkpoint
from tts_policy.convert.restricted_pickle import CheckpointError, StoredTensor
from tts_policy.convert.transformer_weights import cross_attention, self_attention
from tts_policy.convert.weights import WeightSource, load_state
from tts_policy.policy.denoisers.transformer import TransformerSpec
from tts_policy.policy.plan import Reuse
from tts_policy.policy.query_pruner import QueryPruner, QueryPrunerSpec


def read_pruner(checkpoint: Checkpoint, denoiser: TransformerSpec, steps: int) -> QueryPruner:
    """Pruner of a denoiser for a sampler of `steps` steps.

    Raises
    ------
    CheckpointError
        if it is no such pruner, was made for another denoiser or has another number of classes.

    """
    data = checkpoint.data
    if not isinstance(data, dict) or not isinstance(data.get('model_state_dict'), dict):
        raise CheckpointError("the paper's pruner needs model_state_dict, got something else")
    if denoiser.cond_layers:
        raise CheckpointError(
            f'pruner needs a policy with n_cond_layers 0, got {denoiser.cond_layers}'
        )
    tensors = data['model_state_dict']
    for name, value in tensors.items():
        if not isinstance(value, StoredTensor):
            raise CheckpointError(f'weight {name} must be a tensor, got {type(value).__name__}')
    source = WeightSource(tensors, checkpoint.tensor)
    head = source.pair('head', 'head')
    if len(head['head.bias']) != len(Reuse):
        raise CheckpointError(
            f'pruner must tell {len(Reuse)} classes apart, got {len(head["head.bias"])}'
        )
    memory = source.pair('memory_proj', 'memory')
    width, memory_width = memory['memory.weight'].shape
    if memory_width != denoiser.width:
        raise CheckpointError(
            f'pruner must read a memory of width {denoiser.width}, got {memory_width}'
        )
    heads = data.get('attn_heads')
    if type(heads) is not int:
        raise CheckpointError(f'attn_heads must be int, got {str(heads)[:80]!r}')
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
