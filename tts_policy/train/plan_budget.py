# SPDX-License-Identifier: Apache-2.0
"""The budget of a plan: a number of cells, and the cost of as many cells of whole passes.

Sparsity counts cells, but a feed-forward block costs four times as much as a cross-attention
block. A search that only counts cells collects expensive ones. So the computed cells may not cost
more than the same number of cells in whole denoiser passes, which a static schedule executes,
minus the cost of the pruner itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tts_policy.policy.plan import Plan, Reuse
from tts_policy.train.reuse_gradient import Flip

# Changes of flips in the same block and this close in steps do not add up.
NEIGHBOURS = 2
# Prices of one average cell in units of error, in ascending order.
PRICES = (0.0, *np.geomspace(1e-7, 1.0, 57).tolist())


class PlanBudget:
    """Budget of `cells` computed cells that together cost at most as much as average cells.

    block_cost [N]: cost of every block in any unit; reserve: part of the budget, in that unit,
    that the cells may not use.
    """

    def __init__(self, cells: int, block_cost: NDArray[np.number], reserve: float = 0.0) -> None:
        mean = float(block_cost.mean())
        self.cells = cells
        self._excess = block_cost / mean - 1.0
        self._reserve = reserve / mean

    @property
    def expensive(self) -> NDArray[np.bool_]:
        """Blocks [N] that cost more than the mean."""
        return self._excess > 0

    def room(self, plan: Plan) -> float:
        """Return the cost in average cells that a plan may still add; negative if over budget."""
        computed = (plan == Reuse.COMPUTE).sum(axis=0)
        return -self._reserve - float(computed @ self._excess)

    def affords(self, plan: Plan) -> bool:
        """Return whether the plan is within the budget in both number and cost of cells."""
        return int((plan == Reuse.COMPUTE).sum()) <= self.cells and self.room(plan) >= -1e-9

    def additions(self, flips: Sequence[Flip], count: int, room: float) -> list[Flip]:
        """Return the `count` most promising flips to COMPUTE whose total cost fits into the room.

        Neighbours are used only if there are not enough others. If none fit, the cheapest are
        returned.
        """

        def choose(price: float) -> tuple[list[Flip], list[Flip]]:
            priced = self._priced(flips, price)
            chosen = apart(priced, count)
            rest = [flip for flip in priced if flip not in chosen]
            return [*chosen, *rest[: count - len(chosen)]], []

        return self._fitting(choose, room)[0]

    def exchange(
        self, additions: Sequence[Flip], removals: Sequence[Flip], count: int, room: float
    ) -> tuple[list[Flip], list[Flip]]:
        """Return at most `count` additions, and as many removals, that fit into the room."""

        def choose(price: float) -> tuple[list[Flip], list[Flip]]:
            added = apart(self._priced(additions, price), count)
            removed = apart(self._priced(removals, -price), len(added))
            return added[: len(removed)], removed

        return self._fitting(choose, room)

    def _priced(self, flips: Sequence[Flip], price: float) -> list[Flip]:
        return sorted(flips, key=lambda flip: flip.change + price * self._excess[flip.block])

    def _cost(self, flips: Sequence[Flip]) -> float:
        return float(sum(self._excess[flip.block] for flip in flips))

    def _fitting(
        self, choose: Callable[[float], tuple[list[Flip], list[Flip]]], room: float
    ) -> tuple[list[Flip], list[Flip]]:
        """Return the choice at the lowest price at which it fits, or that at the highest price."""
        low, high = 0, len(PRICES) - 1
        while low < high:
            middle = (low + high) // 2
            added, removed = choose(PRICES[middle])
            if self._cost(added) - self._cost(removed) <= room + 1e-9:
                high = middle
            else:
                low = middle + 1
        return choose(PRICES[low])


def apart(flips: Sequence[Flip], count: int) -> list[Flip]:
    """Return the first `count` flips that are not neighbours of one another."""
    chosen: list[Flip] = []
    for flip in flips:
        if len(chosen) >= count:
            break
        columns = (other.step for other in chosen if other.block == flip.block)
        if all(abs(step - flip.step) > NEIGHBOURS for step in columns):
            chosen.append(flip)
    return chosen
