# SPDX-License-Identifier: Apache-2.0
"""First-order change of the error by every reuse decision, from one sparse pass with gradients.

The action error is differentiated by the residual stream after every cell, and every cell is
computed beside the sparse pass, without gradient. If the feature y_c of a cell c were replaced by
a feature y_s of the same kind, the error would change by <dE/dstream_c, y_s - y_c> to first order.
All these products, for all pairs of cells of a kind, give the change for any other plan, including
its effect on later cells that reuse what it computes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tts_policy.policy.engines.eager import MaskedLoop
from tts_policy.policy.feature_cache import FeatureCache
from tts_policy.policy.plan import Plan, Reuse, Segment, computed_before, resolve_sources
from tts_policy.train.sequences import DenseTeacher, PlanErrors, SequenceBatch


def with_sources(plan: Plan, kinds: NDArray[np.int64]) -> Plan:
    """Turn FORWARD and TIMESTEP cells that have nothing to reuse into ROLLOUT."""
    forward, timestep = computed_before(plan == Reuse.COMPUTE, kinds)
    stranded = ((plan == Reuse.FORWARD) & ~forward) | ((plan == Reuse.TIMESTEP) & ~timestep)
    return np.where(stranded, np.int8(Reuse.ROLLOUT), plan)


@dataclass(frozen=True)
class Flip:
    """The change of one cell of a plan to another class, and the expected change of the error."""

    step: int
    block: int
    reuse: Reuse
    change: float

    @property
    def cell(self) -> tuple[int, int]:
        """Step and block."""
        return self.step, self.block

    @property
    def place(self) -> tuple[int, int, int]:
        """Step, block and class."""
        return self.step, self.block, int(self.reuse)


def flipped(plan: Plan, kinds: NDArray[np.int64], *flips: Flip) -> Plan:
    """Return the plan with some cells changed."""
    plan = plan.copy()
    for flip in flips:
        plan[flip.cell] = flip.reuse
    return with_sources(plan, kinds)


class ReuseGradient:
    """First-order change of the error from `plan` to other plans.

    products[j][c, s] is the product of the gradient at cell c with the feature of cell s, both of
    kind j and counted in order of execution; rollout[i, b] is that with the feature of an earlier
    tick.
    """

    def __init__(
        self,
        plan: Plan,
        kinds: NDArray[np.int64],
        products: list[NDArray[np.float32]],
        rollout: NDArray[np.float32],
    ) -> None:
        self.plan, self.kinds, self.rollout, self._products = plan, kinds, rollout, products
        self._kind = np.tile(kinds, len(plan))
        self._place = np.empty(plan.size, np.int64)
        for kind, _ in enumerate(products):
            of_kind = self._kind == kind
            self._place[of_kind] = np.arange(of_kind.sum())
        self._now = self._values(plan)

    def _values(self, plan: Plan) -> NDArray[np.float32]:
        sources = resolve_sources(plan, self.kinds).ravel()
        values = np.empty(plan.size, np.float32)
        for kind, products in enumerate(self._products):
            of_kind = self._kind == kind
            values[of_kind] = products[self._place[of_kind], self._place[sources[of_kind]]]
        return np.where(plan.ravel() == Reuse.ROLLOUT, self.rollout.ravel(), values)

    def change(self, plan: Plan) -> float:
        """Return the expected change of the error with another plan."""
        return float((self._values(plan) - self._now).sum())

    def flip(self, plan: Plan, step: int, block: int, reuse: Reuse) -> Flip | None:
        """Return the flip of a cell of `plan`, None if the class has no source there."""
        changed = flipped(plan, self.kinds, Flip(step, block, reuse, 0.0))
        if changed[step, block] != reuse:
            return None
        before = 0.0 if plan is self.plan else self.change(plan)
        return Flip(step, block, reuse, self.change(changed) - before)

    def flips(self, classes: tuple[Reuse, ...]) -> list[Flip]:
        """Return all flips of reused cells to one of the classes, best first."""
        found = [
            self.flip(self.plan, int(step), int(block), reuse)
            for step, block in np.argwhere(self.plan != Reuse.COMPUTE)
            for reuse in classes
            if reuse != self.plan[step, block]
        ]
        return sorted((f for f in found if f is not None), key=lambda flip: flip.change)


class _GradientLoop(MaskedLoop):
    """The denoising loop, with the residual stream after every cell kept for its gradient.

    features: those of all cells [K, N, B, T, D], of reused ones too; stream: tokens after every
    cell, in order of execution.
    """

    def __init__(self, teacher: DenseTeacher, cache: FeatureCache) -> None:
        super().__init__(teacher.denoiser, teacher.scheduler, teacher.conditioner, cache)
        self._teacher = teacher
        self.x = cache.initial_noise.clone().requires_grad_()
        self.features = torch.empty_like(cache.features)
        self.stream: list[Tensor] = []

    def add_residuals(self, step: int, segment: Segment, tokens: Tensor) -> Tensor:
        """Return the tokens [B, T, D] after the residual blocks of a segment."""
        for number, block in enumerate(segment.blocks):
            if segment.sources:
                conditioning = self._teacher.conditioner.conditioning(step, block)
                with torch.no_grad():
                    computed = self._teacher.denoiser.blocks[block](tokens, conditioning)
                residual = self.feature(segment.sources[number])
            else:
                computed = residual = self.compute(step, block, tokens)
            self.features[step, block] = computed.detach()
            tokens = tokens + residual
            tokens.retain_grad()
            self.stream.append(tokens)
        return tokens


def reuse_gradient(errors: PlanErrors, batch: SequenceBatch, plan: Plan) -> ReuseGradient:
    """Return the gradient of the mean error over all ticks of a batch, all shares of it.

    It costs about one dense pass a tick.
    """
    teacher, (steps, blocks) = errors.teacher, plan.shape
    of_kind = [torch.from_numpy(errors.kinds == kind) for kind in np.unique(errors.kinds)]
    sizes = [steps * int(columns.sum()) for columns in of_kind]
    cache = batch.cache()
    products = [cache.store.new_zeros(size, size) for size in sizes]
    rollout = cache.store.new_zeros(steps, blocks)
    for number in range(1, batch.ticks):
        before = cache.features.clone()
        with torch.no_grad():
            teacher.conditioner.encode(batch.observations[number])
        loop = _GradientLoop(teacher, cache)
        measured = errors.measure(loop.run(plan), batch.targets[number])
        (measured[: batch.size].sum() / (batch.count * (batch.ticks - 1))).backward()
        gradients = [tokens.grad for tokens in loop.stream]
        assert all(gradient is not None for gradient in gradients)
        gradient = torch.stack(gradients).view(steps, blocks, -1)  # type: ignore[arg-type]
        features = loop.features.view(steps, blocks, -1)
        rollout += torch.linalg.vecdot(gradient, before.view(steps, blocks, -1))
        for product, columns in zip(products, of_kind, strict=True):
            left, right = gradient[:, columns], features[:, columns]
            product += left.flatten(0, 1) @ right.flatten(0, 1).T
    rollout, *products = (teacher.replicas.summed(part).cpu() for part in (rollout, *products))
    by_kind = [product.numpy() for product in products]
    return ReuseGradient(plan, errors.kinds, by_kind, rollout.numpy())
