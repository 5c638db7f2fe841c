# SPDX-License-Identifier: Apache-2.0
"""Sparsity by latency: raised while the p95 latency is above its budget, lowered when well below.

Never above what the bundle recommends, where success begins to fall; a requested sparsity that is
higher already stays as it is. Pure logic.
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
    """Chooses the sparsity of the next tick.

    `short_s` is the p95 latency in s while it exceeds the budget and nothing is left to raise.
    """

    def __init__(self, recommended: float) -> None:
        self._recommended = recommended
        self._raised = 0.0
        self._latencies_s: deque[float] = deque(maxlen=TICKS)
        self.short_s: float | None = None

    def record(self, latency_s: float) -> None:
        """Take the latency of one tick; dense first ticks of an episode are to be left out."""
        self._latencies_s.append(latency_s)

    def choose(self, requested: float, budget_s: float) -> float:
        """Sparsity in [requested, recommended] for the next tick; budget_s 0 is no budget."""
        room = max(0.0, self._recommended - requested)
        if budget_s <= 0.0:
            self._raised, self.short_s = 0.0, None
            return requested
        if len(self._latencies_s) == TICKS:
            p95_s = float(np.percentile(list(self._latencies_s), 95))
            before = self._raised
            self.short_s = p95_s if p95_s > budget_s and before >= room else None
            if p95_s > budget_s:
                self._raised += STEP
            elif p95_s < ROOM * budget_s:
                self._raised = max(0.0, self._raised - STEP)
            self._raised = min(self._raised, room)
            if self._raised != before:
                self._latencies_s.clear()
        return requested + min(self._raised, room)
