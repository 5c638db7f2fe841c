# SPDX-License-Identifier: Apache-2.0
"""Executed floating-point operations of a tick, two per multiply-add, by formula.

An architecture declares what its blocks, its embedding with the head, and its conditioner cost.
Attention fast paths hide their work from torch's counter, so matrix products are checked against
it in the tests and attention is added by formula. Normalisation and activation are left out, as
usual.
"""

from __future__ import annotations

from tts_policy.policy.denoisers.denoiser import DenoiserSpec
from tts_policy.policy.plan import Plan, Reuse
from tts_policy.policy.pruner import PrunerSpec
from tts_policy.policy.query_pruner import QueryPrunerSpec


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
    return int(computed @ spec.stack.flops) + len(plan) * spec.step_flops
