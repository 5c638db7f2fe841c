# SPDX-License-Identifier: Apache-2.0
"""A differentiable masked denoising loop: how the pruner gets its gradient.

Gates are straight-through: the forward pass follows the hard plan, exactly as the engine would,
and the backward pass sees softmax(logits) over the valid classes. A gradient toward COMPUTE needs
the computed feature, so besides the cells that the plan computes only a random share of the
others is computed as candidates; without them a training tick would cost a dense one and more.
Weights are frozen. Caches of the tick itself carry gradients, those of earlier ticks do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tts_policy.core.denoiser import BlockKind, Denoiser
from tts_policy.core.lattice import Lattice
from tts_policy.core.memory import ConditionalMemory
from tts_policy.core.plan import Plan, Reuse, computed_before
from tts_policy.core.scheduler import NoiseScheduler


@dataclass(frozen=True)
class CellGates:
    """Gates of one tick: plans [B, K, N], soft gates [B, K, N, 4], candidate cells [K, N]."""

    plans: NDArray[np.int8]
    soft: Tensor
    candidates: NDArray[np.bool_]


def soft_gates(
    logits: Tensor, plans: Sequence[Plan], valid: Sequence[NDArray[np.bool_]]
) -> Tensor:
    """Softmax of logits [B, K, N, 4] over the classes valid under each sample's plan."""
    masks = []
    for plan, rollout in zip(plans, valid, strict=True):
        forward, timestep = computed_before(plan == Reuse.COMPUTE)
        masks.append(np.stack([np.ones_like(forward), forward, timestep, rollout], axis=-1))
    mask = torch.from_numpy(np.stack(masks))
    return torch.softmax(logits.masked_fill(~mask, float('-inf')), dim=-1)


class SparseStudent:
    """Runs one tick of a batch of sequences, each against its own lattice."""

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: NoiseScheduler,
        memory: ConditionalMemory,
        lattices: Sequence[Lattice],
    ) -> None:
        self._denoiser, self._scheduler = denoiser, scheduler
        self._memory, self._lattices = memory, lattices
        batch, spec = len(lattices), denoiser.spec
        self._zeros = torch.zeros(batch, spec.horizon, spec.width)
        self._by_kind = [self._zeros] * len(BlockKind)
        self._by_block = [self._zeros] * spec.blocks

    def tick(self, gates: CellGates) -> Tensor:
        """Normalised actions [B, T, A] with gradients to the soft gates; fills the lattices."""
        x = torch.cat([lattice.initial_noise for lattice in self._lattices])
        for step in range(self._scheduler.spec.steps):
            tokens = self._denoiser.embed(x)
            for block in range(self._denoiser.spec.blocks):
                tokens = tokens + self._cell(step, block, tokens, gates)
            noise = None
            if self._scheduler.needs_noise:
                noise = torch.cat([lattice.step_noise[step] for lattice in self._lattices])
            x = self._scheduler.step(step, x, self._denoiser.predict(tokens), noise)
        for lattice, plan in zip(self._lattices, gates.plans, strict=True):
            lattice.commit(plan)
        return x

    def _cell(self, step: int, block: int, tokens: Tensor, gates: CellGates) -> Tensor:
        classes = gates.plans[:, step, block]
        kind = block % len(BlockKind)
        is_computed = classes == Reuse.COMPUTE
        if not (is_computed.any() or gates.candidates[step, block]):
            return self._reused(step, block, classes)
        cond = self._memory.conditioning(step, block // len(BlockKind))
        # All samples, also those whose plan reuses: plans differ little within a batch, and a
        # gate without its computed feature would have no gradient toward COMPUTE.
        computed = self._denoiser.blocks[block](tokens, cond)
        rollout = torch.stack([lattice.features[step, block] for lattice in self._lattices])
        # A feature never computed is NaN; its gate is zero, but zero times NaN is NaN.
        features = (
            computed,
            self._by_kind[kind],
            self._by_block[block],
            rollout.nan_to_num(),
        )
        probability = gates.soft[:, step, block]
        hard = torch.nn.functional.one_hot(torch.from_numpy(classes).long(), len(Reuse))
        weight = hard + probability - probability.detach()
        output = torch.zeros_like(tokens)
        for reuse, feature in zip(Reuse, features, strict=True):
            output = output + weight[:, reuse, None, None] * feature
        self._remember(step, block, computed, is_computed)
        return output

    def _reused(self, step: int, block: int, classes: NDArray[np.int8]) -> Tensor:
        caches = {
            Reuse.FORWARD: self._by_kind[block % len(BlockKind)],
            Reuse.TIMESTEP: self._by_block[block],
        }
        first = Reuse(int(classes[0]))
        if first in caches and (classes == first).all():
            return caches[first]
        rows = [
            caches[Reuse(int(c))][n] if c in caches else lattice.features[step, block]
            for n, (c, lattice) in enumerate(zip(classes, self._lattices, strict=True))
        ]
        return torch.stack(rows)

    def _remember(
        self, step: int, block: int, computed: Tensor, is_computed: NDArray[np.bool_]
    ) -> None:
        if not is_computed.any():
            return
        kind = block % len(BlockKind)
        if is_computed.all():
            self._by_kind[kind] = self._by_block[block] = computed
        else:
            mask = torch.from_numpy(is_computed)[:, None, None]
            self._by_kind[kind] = torch.where(mask, computed, self._by_kind[kind])
            self._by_block[block] = torch.where(mask, computed, self._by_block[block])
        for n in np.flatnonzero(is_computed):
            self._lattices[n].features[step, block].copy_(computed[n].detach())
