# SPDX-License-Identifier: Apache-2.0
"""Sparsity by latency: raised while the p95 latency is above its budget, lowered when well below.

It is never raised above what the bundle recommends, where success begins to fall. A request that
is higher already stays as it is. Pure logic.
"""

from __future__ import annotations

from collections import deque

import numpy as np

STEP = 0.05
# Ticks between two decisions: each is made of latencies at one sparsity only.
TICKS = 8
# Sparsity is lowered only when there is room for the slower tick that follows.
ROOM = 0.7


class SparsityGovernor:
    """Knows the sparsity in force: `choose` gives that of the next tick.

    `short_s` is the p95 latency in s while it exceeds the budget and nothing is left to raise.
    """

    def __init__(self, recommended: float) -> None:
        self._recommended = recommended
        self._raised = 0.0
        self._latencies_s: deque[float] = deque(maxlen=TICKS)
        self.short_s: float | None = None

    def choose(self, requested: float) -> float:
        """Sparsity of the next tick, at least as requested."""
        return requested + min(self._raised, self._room(requested))

    def record(self, latency_s: float, requested: float, budget_s: float) -> None:
        """Take the latency of a tick and decide by the last ones; budget_s 0 is no budget.

        The dense first tick of an episode is to be left out.
        """
        if budget_s <= 0.0:
            self._latencies_s.clear()
            self._raised, self.short_s = 0.0, None
            return
        self._latencies_s.append(latency_s)
        if len(self._latencies_s) < TICKS:
            return
        p95_s = float(np.percentile(list(self._latencies_s), 95))
        before, room = self._raised, self._room(requested)
        self.short_s = p95_s if p95_s > budget_s and before >= room else None
        if p95_s > budget_s:
            self._raised += STEP
        elif p95_s < ROOM * budget_s:
            self._raised = max(0.0, self._raised - STEP)
        self._raised = min(self._raised, room)
        if self._raised != before:
            self._latencies_s.clear()

    def _room(self, requested: float) -> float:
        return max(0.0, self._recommended - requested)
