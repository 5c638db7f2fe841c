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


def conditional_encoder_flops(spec: DenoiserSpec) -> int:
    """FLOPs of encoding the observation tokens, with keys and values of every layer, once."""
    width = spec.width
    per_token = 2 * spec.obs_features * width + 16 * width * width + spec.layers * 4 * width**2
    return spec.obs_steps * per_token


def pruner_flops(spec: PrunerSpec) -> int:
    """FLOPs of the logits of one tick, folded gates left out."""
    hidden = spec.hidden
    observation = 2 * spec.obs_steps * spec.memory_width * hidden + 2 * hidden * hidden
    return observation + 2 * spec.steps * hidden * spec.blocks * len(Reuse)


def decoder_flops(spec: DenoiserSpec, plan: Plan) -> int:
    """FLOPs of executing a plan: computed blocks, and embedding and head of every step."""
    computed = (plan == Reuse.COMPUTE).sum(axis=0)
    return int(computed @ block_flops(spec)) + len(plan) * step_flops(spec)
