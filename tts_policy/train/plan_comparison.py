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

from tts_policy.policy.engines.eager import MaskedLoop
from tts_policy.policy.feature_cache import FeatureCache
from tts_policy.policy.plan import Plan, make_plan, realised_sparsity, static_plan
from tts_policy.policy.pruner import Pruner
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.train.tick_sequences import DenseTeacher, TickSequence

# Plan of tick r, given the cache and the observation tokens [1, To, D] of that tick.
PlanMaker = Callable[[FeatureCache, Tensor, int], Plan]


@torch.no_grad()
def sparse_actions(
    teacher: DenseTeacher, sequence: TickSequence, cache: FeatureCache, make: PlanMaker
) -> tuple[Tensor, float]:
    """Run the ticks after the first on a cache as the dense first tick left it.

    Returns normalised actions [R - 1, T, A] and the mean realised sparsity.
    """
    denoiser, scheduler = teacher.denoiser, teacher.scheduler
    conditioner = teacher.conditioner
    actions, sparsity = [], []
    for tick, features in enumerate(sequence.features[1:], start=1):
        conditioner.encode(features[None])
        plan = make(cache, conditioner.observation_tokens, tick)
        x = MaskedLoop(denoiser, scheduler, conditioner, cache).run(plan)
        cache.commit(plan)
        actions.append(x)
        sparsity.append(realised_sparsity(plan))
    return torch.cat(actions), float(np.mean(sparsity))


class PlanMakers:
    """The plans to compare, all at one sparsity."""

    def __init__(
        self,
        teacher: DenseTeacher,
        sampler: SamplerSpec,
        pruner: Pruner,
        trained: Sequence[TickSequence],
        sparsity: float,
    ) -> None:
        self._teacher, self._sampler, self._pruner = teacher, sampler, pruner
        self._sparsity = sparsity
        self._random = np.random.default_rng(0)
        with torch.no_grad():
            self._gates = pruner.gates(teacher.conditioner.time_tokens)
            features = torch.cat([sequence.features for sequence in trained])
            tokens = teacher.denoiser.observation_tokens(features)
            self._tokens = tokens
            self.mean_logits = pruner(self._gates, tokens, sparsity).mean(0).cpu().numpy()

    def _logits(self, tokens: Tensor) -> NDArray[np.float32]:
        return self._pruner(self._gates, tokens, self._sparsity)[0].cpu().numpy()

    def _plan(self, logits: NDArray[np.float32], cache: FeatureCache) -> Plan:
        valid = cache.rollout_valid(self._sampler.max_rollout_age)
        return make_plan(
            logits,
            self._sparsity,
            valid,
            self._sampler.force_first_step,
            self._teacher.denoiser.spec.stack.kinds,
        )

    def learned(self, cache: FeatureCache, tokens: Tensor, tick: int) -> Plan:
        """The pruner on this tick's memory."""
        return self._plan(self._logits(tokens), cache)

    def constant(self, cache: FeatureCache, tokens: Tensor, tick: int) -> Plan:
        """The pruner's mean logits over its training ticks."""
        return self._plan(self.mean_logits, cache)

    def other_tick(self, cache: FeatureCache, tokens: Tensor, tick: int) -> Plan:
        """The pruner on the memory of a training tick drawn at random."""
        n = int(self._random.integers(len(self._tokens)))
        return self._plan(self._logits(self._tokens[n : n + 1]), cache)

    def static(self, cache: FeatureCache, tokens: Tensor, tick: int) -> Plan:
        """All blocks at quadratically spaced steps; a whole number of steps, rounded up."""
        steps, blocks = self._teacher.scheduler.spec.steps, self._teacher.denoiser.spec.blocks
        count = int(np.ceil((1 - self._sparsity) * steps - 1e-9))
        return static_plan(steps, blocks, count)

    def random(self, cache: FeatureCache, tokens: Tensor, tick: int) -> Plan:
        """Random cells and classes of the same budget."""
        steps, blocks = self._teacher.scheduler.spec.steps, self._teacher.denoiser.spec.blocks
        logits = self._random.standard_normal((steps, blocks, 4)).astype(np.float32)
        return self._plan(logits, cache)


def compare_plans(
    teacher: DenseTeacher,
    sampler: SamplerSpec,
    pruner: Pruner,
    trained: Sequence[TickSequence],
    tests: Sequence[TickSequence],
    sparsity: float,
) -> dict[str, object]:
    """Mean and standard error (over sequences) of the L1 action error of every kind of plan."""
    makers = PlanMakers(teacher, sampler, pruner, trained, sparsity)
    arms: dict[str, PlanMaker] = {
        'learned': makers.learned,
        'constant': makers.constant,
        'other_tick': makers.other_tick,
        'static': makers.static,
        'random': makers.random,
    }
    # A plan that does not look is its own mean, and the same for any other tick.
    same = () if pruner.reads_observation else ('constant', 'other_tick')
    arms = {name: make for name, make in arms.items() if name not in same}
    errors: dict[str, list[float]] = {name: [] for name in arms}
    realised: dict[str, list[float]] = {name: [] for name in arms}
    for sequence in tqdm(tests, desc='comparing plans', unit='episode', mininterval=5):
        target = teacher.actions(sequence)
        for name, make in arms.items():
            cache = teacher.first_tick(sequence)
            actions, share = sparse_actions(teacher, sequence, cache, make)
            errors[name].append((actions - target[1:]).abs().mean().item())
            realised[name].append(share)
    for name in same:
        errors[name], realised[name] = errors['learned'], realised['learned']
    return {
        'sparsity': sparsity,
        'sequences': len(tests),
        'l1_error': {
            name: {
                'mean': float(np.mean(values)),
                'standard_error': float(np.std(values, ddof=1) / np.sqrt(len(values))),
                'realised_sparsity': float(np.mean(realised[name])),
            }
            for name, values in errors.items()
        },
    }
