# SPDX-License-Identifier: Apache-2.0
"""Executed floating-point operations of a tick, two per multiply-add, by formula.

Attention fast paths hide their work from torch's counter, so matrix products are checked against
it in the tests and attention is added here. Normalisation and activation are left out, as usual.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tts_policy.core.denoiser import BlockKind, DenoiserSpec
from tts_policy.core.plan import Plan, Reuse
from tts_policy.core.pruner import PrunerSpec
from tts_policy.core.query_pruner import QueryPrunerSpec


def block_flops(spec: DenoiserSpec) -> NDArray[np.int64]:
    """FLOPs of one execution of every residual block, [N]."""
    tokens, width, memory = spec.horizon, spec.width, 1 + spec.obs_steps
    linear = 2 * tokens * width * width
    per_kind = np.zeros(len(BlockKind), np.int64)
    per_kind[BlockKind.SELF_ATTENTION] = 4 * linear + 4 * tokens * tokens * width
    per_kind[BlockKind.CROSS_ATTENTION] = 2 * linear + 4 * tokens * memory * width
    per_kind[BlockKind.FEED_FORWARD] = 8 * linear
    return np.tile(per_kind, spec.layers)


def step_flops(spec: DenoiserSpec) -> int:
    """FLOPs that every denoising step costs whatever its plan: embedding and head."""
    return 4 * spec.horizon * spec.width * spec.action_dim


def conditional_encoder_flops(spec: DenoiserSpec, steps: int) -> int:
    """FLOPs of one tick's memory with the keys and values of every layer.

    steps: denoising steps, each of which has its own memory where condition tokens are mixed.
    """
    width, tokens = spec.width, 1 + spec.obs_steps
    embedding = spec.obs_steps * 2 * spec.obs_features * width
    keys_values = spec.layers * 4 * width**2
    if spec.cond_layers == 0:
        return embedding + spec.obs_steps * (16 * width * width + keys_values)
    layer = 24 * width * width + 4 * tokens * width
    return embedding + steps * tokens * (spec.cond_layers * layer + keys_values)


def pruner_flops(spec: PrunerSpec | QueryPrunerSpec) -> int:
    """FLOPs of the logits of one tick, folded gates left out."""
    classes = len(Reuse)
    if isinstance(spec, QueryPrunerSpec):
        queries, width = spec.steps * spec.blocks, spec.width
        memory = 2 * spec.obs_steps * width * (spec.memory_width + 2 * width)
        attention = 4 * (1 + spec.obs_steps) * width + 2 * width * width
        return memory + queries * (attention + 4 * width * spec.feed_forward + 2 * width * classes)
    hidden = spec.hidden
    observation = 2 * spec.obs_steps * spec.memory_width * hidden + 2 * hidden * hidden
    return observation + 2 * spec.steps * hidden * spec.blocks * classes


def decoder_flops(spec: DenoiserSpec, plan: Plan) -> int:
    """FLOPs of executing a plan: computed blocks, and embedding and head of every step."""
    computed = (plan == Reuse.COMPUTE).sum(axis=0)
    return int(computed @ block_flops(spec)) + len(plan) * step_flops(spec)
