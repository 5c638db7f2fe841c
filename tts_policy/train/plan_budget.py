# SPDX-License-Identifier: Apache-2.0
"""What a plan may compute: a number of cells, at no more than so many whole passes would cost.

The sparsity of a plan counts cells, but a feed-forward block costs four times a cross-attention
block. A search that counts cells alone gathers the dear ones. So the computed cells may not cost
more than as many cells of whole denoiser passes, which is what a static schedule executes, less
what the pruner itself costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tts_policy.policy.plan import Plan, Reuse
from tts_policy.train.reuse_gradient import Flip

# Of a block's column, flips this close in steps replace one another: their changes do not add up.
NEIGHBOURS = 2
# Error that one mean cell of cost may be worth, the cheapest first.
PRICES = (0.0, *np.geomspace(1e-7, 1.0, 57).tolist())


class PlanBudget:
    """Budget of `cells` computed cells, whose cost is that of average cells at most.

    block_cost [N]: cost of every block in any unit; reserve: cost in that unit that the cells stay
    below the average by.
    """

    def __init__(self, cells: int, block_cost: NDArray[np.number], reserve: float = 0.0) -> None:
        mean = float(block_cost.mean())
        self.cells = cells
        self._excess = block_cost / mean - 1.0
        self._reserve = reserve / mean

    @property
    def dear(self) -> NDArray[np.bool_]:
        """Blocks [N] that cost more than the mean."""
        return self._excess > 0

    def room(self, plan: Plan) -> float:
        """Cost, in mean cells, that a plan could add before it is too dear; negative if it is."""
        computed = (plan == Reuse.COMPUTE).sum(axis=0)
        return -self._reserve - float(computed @ self._excess)

    def affords(self, plan: Plan) -> bool:
        """Whether the plan computes no more, and nothing dearer, than the budget allows."""
        return int((plan == Reuse.COMPUTE).sum()) <= self.cells and self.room(plan) >= -1e-9

    def additions(self, flips: Sequence[Flip], count: int, room: float) -> list[Flip]:
        """The `count` most promising flips to COMPUTE that fit into the room together.

        Neighbours come in only where there are not enough others. The cheapest ones, if none fit.
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
        """At most `count` additions, and as many removals, that fit into the room together."""

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
        """The choice at the lowest price of cost at which it fits, or that at the highest."""
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
    """The first `count` flips that are not neighbours of one another."""
    chosen: list[Flip] = []
    for flip in flips:
        if len(chosen) >= count:
            break
        columns = (other.step for other in chosen if other.block == flip.block)
        if all(abs(step - flip.step) > NEIGHBOURS for step in columns):
            chosen.append(flip)
    return chosen
