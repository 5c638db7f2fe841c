# SPDX-License-Identifier: Apache-2.0
"""Action error at equal cost of learned, constant, static and random plans, and of wrong memory.

All plans of a comparison compute the same number of cells, share the noise with the dense
reference and carry their caches over the ticks of held-out sequences. Errors are L1 in
normalised action units over ticks 1 and later, since tick 0 is dense for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from tts_policy.policy.feature_cache import FeatureCache
from tts_policy.policy.plan import Plan, make_plan, realised_sparsity, static_plan
from tts_policy.policy.pruner import Pruner
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.train.sequences import DenseTeacher, TickSequence

# Makes the plan of a tick from the cache and the observation tokens [1, To, D] of that tick.
PlanMaker = Callable[[FeatureCache, Tensor], Plan]


@torch.no_grad()
def sparse_actions(
    teacher: DenseTeacher, sequence: TickSequence, cache: FeatureCache, make: PlanMaker
) -> tuple[Tensor, float]:
    """Run the ticks after the first on a cache that the dense first tick has filled.

    Returns normalised actions [R - 1, T, A] and the mean realised sparsity.
    """
    actions, sparsity = [], []
    for features in sequence.features[1:]:
        teacher.conditioner.encode(features[None])
        plan = make(cache, teacher.conditioner.observation_tokens)
        actions.append(teacher.loop(cache).run(plan))
        cache.commit(plan)
        sparsity.append(realised_sparsity(plan))
    return torch.cat(actions), float(np.mean(sparsity))


@torch.no_grad()
def plan_makers(
    teacher: DenseTeacher,
    sampler: SamplerSpec,
    pruner: Pruner,
    trained: Sequence[TickSequence],
    sparsity: float,
) -> dict[str, PlanMaker]:
    """Return the plans to compare at one sparsity, by name.

    learned: the pruner on this tick's memory; constant: its mean logits over the training ticks;
    other_tick: the pruner on the memory of a random training tick; static: all blocks of
    quadratically spaced steps, a whole number of them, rounded up; random: cells and classes. A
    pruner that does not read the observation is its own `constant` and `other_tick`.
    """
    steps, blocks = teacher.scheduler.spec.steps, teacher.denoiser.spec.blocks
    random, gates = np.random.default_rng(0), pruner.gates(teacher.conditioner.time_tokens)
    tokens_seen = teacher.denoiser.observation_tokens(
        torch.cat([sequence.features for sequence in trained])
    )
    mean_logits = pruner(gates, tokens_seen, sparsity).mean(0).cpu().numpy()

    def plan(logits: NDArray[np.float32], cache: FeatureCache) -> Plan:
        valid = cache.rollout_valid(sampler.max_rollout_age)
        return make_plan(logits, sparsity, valid, sampler.force_first_step, teacher.kinds)

    def learned(cache: FeatureCache, tokens: Tensor) -> Plan:
        return plan(pruner(gates, tokens, sparsity)[0].cpu().numpy(), cache)

    def constant(cache: FeatureCache, tokens: Tensor) -> Plan:
        return plan(mean_logits, cache)

    def other_tick(cache: FeatureCache, tokens: Tensor) -> Plan:
        n = int(random.integers(len(tokens_seen)))
        return learned(cache, tokens_seen[n : n + 1])

    def static(cache: FeatureCache, tokens: Tensor) -> Plan:
        return static_plan(steps, blocks, int(np.ceil((1 - sparsity) * steps - 1e-9)))

    def at_random(cache: FeatureCache, tokens: Tensor) -> Plan:
        return plan(random.standard_normal((steps, blocks, 4)).astype(np.float32), cache)

    reading = {'constant': constant, 'other_tick': other_tick}
    makers: dict[str, PlanMaker] = {'learned': learned}
    makers |= reading if pruner.reads_observation else {}
    return makers | {'static': static, 'random': at_random}


def compare_plans(
    teacher: DenseTeacher,
    sampler: SamplerSpec,
    pruner: Pruner,
    trained: Sequence[TickSequence],
    tests: Sequence[TickSequence],
    sparsity: float,
) -> dict[str, object]:
    """Return mean and standard error over sequences of the L1 action error of every plan."""
    makers = plan_makers(teacher, sampler, pruner, trained, sparsity)
    errors: dict[str, list[float]] = {name: [] for name in makers}
    realised: dict[str, list[float]] = {name: [] for name in makers}
    for sequence in tqdm(tests, desc='comparing plans', unit='episode', mininterval=5):
        target = teacher.actions(sequence)
        for name, make in makers.items():
            cache = teacher.first_tick(sequence)
            actions, share = sparse_actions(teacher, sequence, cache, make)
            errors[name].append((actions - target[1:]).abs().mean().item())
            realised[name].append(share)
    rows = {
        name: {
            'mean': float(np.mean(values)),
            'standard_error': float(np.std(values, ddof=1) / np.sqrt(len(values))),
            'realised_sparsity': float(np.mean(realised[name])),
        }
        for name, values in errors.items()
    }
    for name in ('constant', 'other_tick'):
        rows.setdefault(name, rows['learned'])
    return {'sparsity': sparsity, 'sequences': len(tests), 'l1_error': rows}
