# SPDX-License-Identifier: Apache-2.0
"""What every reuse decision would change, to first order: one sparse pass with gradients.

The action error is differentiated by the residual stream after every cell, and every cell is
computed beside the sparse pass, without gradient. For a cell c whose feature y_c were replaced by
feature y_s of the same kind, the error changes by <dE/dstream_c, y_s - y_c> to first order. All
these products, for all pairs of cells of a kind, tell what any other plan would change, with its
effect on later cells that reuse what it computes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tts_policy.policy.plan import Plan, Reuse, computed_before, resolve_sources
from tts_policy.train.lessons import ActionError, LessonBatch, SharedPlanLoop


def with_sources(plan: Plan, kinds: NDArray[np.int64]) -> Plan:
    """Turn FORWARD and TIMESTEP cells that have nothing to reuse into ROLLOUT."""
    forward, timestep = computed_before(plan == Reuse.COMPUTE, kinds)
    stranded = ((plan == Reuse.FORWARD) & ~forward) | ((plan == Reuse.TIMESTEP) & ~timestep)
    return np.where(stranded, np.int8(Reuse.ROLLOUT), plan)


@dataclass(frozen=True)
class Flip:
    """One cell of a plan taking another class, and the change of the error expected of it."""

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
    """Plan with some cells changed."""
    plan = plan.copy()
    for flip in flips:
        plan[flip.cell] = flip.reuse
    return with_sources(plan, kinds)


class ReuseGradient:
    """First-order change of the error from `plan` to other plans.

    products[j][c, s] is the product of the gradient at cell c with the feature of cell s, both of
    kind j and counted in order of execution; rollout[i, b] that with the feature of an earlier
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
        """Expected change of the error with another plan."""
        return float((self._values(plan) - self._now).sum())

    def flip(self, plan: Plan, step: int, block: int, reuse: Reuse) -> Flip | None:
        """Flip of a cell of `plan`, None if the class has no source there."""
        changed = flipped(plan, self.kinds, Flip(step, block, reuse, 0.0))
        if changed[step, block] != reuse:
            return None
        before = 0.0 if plan is self.plan else self.change(plan)
        return Flip(step, block, reuse, self.change(changed) - before)

    def flips(self, classes: tuple[Reuse, ...]) -> list[Flip]:
        """Flips of reused cells to one of the classes, best first."""
        found = [
            self.flip(self.plan, int(step), int(block), reuse)
            for step, block in np.argwhere(self.plan != Reuse.COMPUTE)
            for reuse in classes
            if reuse != self.plan[step, block]
        ]
        return sorted((f for f in found if f is not None), key=lambda flip: flip.change)


class _GradientTick:
    """One tick by a plan that keeps the residual stream after every cell for its gradient."""

    def __init__(self, loop: SharedPlanLoop, plan: Plan, store: Tensor) -> None:
        self._loop, self._store = loop, store
        self._plan, self._sources = plan, resolve_sources(plan, loop.kinds)
        self.before = store.clone()
        self.features = torch.empty_like(store)
        self.stream: list[Tensor] = []
        self._live: dict[int, Tensor] = {}

    def run(self, batch: LessonBatch, tick: int) -> Tensor:
        """Actions [B, T, A] with a graph; fills features, stream and the store."""
        denoiser = self._loop.denoiser
        with torch.no_grad():
            self._loop.conditioner.encode(batch.observations[tick])
        x, x0 = batch.initial_noise.clone().requires_grad_(), None
        for step in range(len(self._plan)):
            tokens = denoiser.embed(x)
            for block in range(self._plan.shape[1]):
                tokens = tokens + self._cell(step, block, tokens)
                tokens.retain_grad()
                self.stream.append(tokens)
            eps = denoiser.predict(tokens)
            x, x0 = self._loop.scheduler.step(step, x, eps, batch.noise(step), x0)
        return x

    def _cell(self, step: int, block: int, tokens: Tensor) -> Tensor:
        compute = self._loop.denoiser.blocks[block]
        cond = self._loop.conditioner.conditioning(step, block)
        if self._plan[step, block] == Reuse.COMPUTE:
            residual = compute(tokens, cond)
            self.features[step, block] = self._store[step, block] = residual.detach()
            self._live[int(self._sources[step, block])] = residual
            return residual
        with torch.no_grad():
            self.features[step, block] = compute(tokens, cond)
        if self._plan[step, block] == Reuse.ROLLOUT:
            return self.before[step, block]
        return self._live[int(self._sources[step, block])]


def reuse_gradient(
    loop: SharedPlanLoop, batch: LessonBatch, plan: Plan, measure: ActionError
) -> ReuseGradient:
    """Gradient of the mean error over the ticks of a batch, all shares of it.

    It costs about one dense pass a tick.
    """
    steps, blocks = plan.shape
    of_kind = [torch.from_numpy(loop.kinds == kind) for kind in np.unique(loop.kinds)]
    sizes = [steps * int(columns.sum()) for columns in of_kind]
    store = batch.first_tick.clone()
    products = [store.new_zeros(size, size) for size in sizes]
    rollout = store.new_zeros(steps, blocks)
    for number in range(1, batch.ticks):
        tick = _GradientTick(loop, plan, store)
        errors = measure(tick.run(batch, number), batch.targets[number])
        (errors[: batch.size].sum() / (batch.count * (batch.ticks - 1))).backward()
        gradients = [tokens.grad for tokens in tick.stream]
        assert all(gradient is not None for gradient in gradients)
        gradient = torch.stack(gradients).view(steps, blocks, -1)  # type: ignore[arg-type]
        features = tick.features.view(steps, blocks, -1)
        rollout += torch.linalg.vecdot(gradient, tick.before.view(steps, blocks, -1))
        for product, columns in zip(products, of_kind, strict=True):
            left, right = gradient[:, columns], features[:, columns]
            product += left.flatten(0, 1) @ right.flatten(0, 1).T
    rollout, *products = (loop.replicas.summed(part).cpu() for part in (rollout, *products))
    by_kind = [product.numpy() for product in products]
    return ReuseGradient(plan, loop.kinds, by_kind, rollout.numpy())
