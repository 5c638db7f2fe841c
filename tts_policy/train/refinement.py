# SPDX-License-Identifier: Apache-2.0
"""How a plan gets denser: by whole passes between those that it has, not by single cells.

A cell computed alone among reused ones mixes features of different noise levels; many of them,
chosen by what each promises by itself, make a plan worse than the one they were added to. A whole
pass more is what a static schedule with more steps has, and is rarely worse.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tts_policy.core.plan import Plan, Reuse


def refinement_steps(plan: Plan) -> list[int]:
    """Steps that a plan [K, N] does not compute entirely, in the order in which to complete them.

    Those where most is reused come first, each in the middle of the widest gap between passes, on
    the time scale on which a static schedule is evenly spaced. What is missing from the others,
    the plan's own passes, was left out on purpose and comes after as many new passes.
    """
    share = (plan == Reuse.COMPUTE).mean(axis=1)
    own = np.flatnonzero(share >= 0.5).tolist()
    time = 1.0 - np.sqrt(1.0 - np.linspace(0.0, 1.0, len(plan)))
    passes, order, rest = list(own), [], np.flatnonzero(share < 0.5).tolist()
    while rest:
        gaps = [min((abs(time[i] - time[j]) for j in passes), default=1.0) for i in rest]
        step = rest.pop(int(np.argmax(gaps)))
        passes.append(step)
        order.append(step)
    order[len(own) : len(own)] = own
    return [step for step in order if share[step] < 1.0]


def refinement_order(plan: Plan) -> NDArray[np.int64]:
    """Cells that a plan reuses, [M] numbers i * N + b, in the order in which to compute them."""
    steps = refinement_steps(plan)
    cells = np.arange(plan.size).reshape(plan.shape)[steps]
    return cells[plan[steps] != Reuse.COMPUTE]


def refined(plan: Plan, cells: int) -> Plan:
    """Plan with as many whole passes more as `cells` computed cells in all suffice for."""
    plan = plan.copy()
    for step in refinement_steps(plan):
        missing = int((plan[step] != Reuse.COMPUTE).sum())
        if missing > cells - int((plan == Reuse.COMPUTE).sum()):
            break
        plan[step] = Reuse.COMPUTE
    return plan
