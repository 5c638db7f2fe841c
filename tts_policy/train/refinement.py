# SPDX-License-Identifier: Apache-2.0
"""How a plan gets denser: by whole passes between those that it has, not by single cells.

A cell computed alone among reused ones mixes features of different noise levels; many of them,
chosen by what each promises by itself, make a plan worse than the one they were added to. A whole
pass more is what a static schedule with more steps has, and is rarely worse. Where cells are left
that do not make a pass, the last one is partial.
"""

from __future__ import annotations

import numpy as np

from tts_policy.core.plan import Plan, Reuse

# A step is one of a plan's passes if it computes this share of what its densest step does.
PASS_SHARE = 0.5


def refinement_steps(plan: Plan) -> list[int]:
    """Steps that a plan [K, N] does not compute entirely, in the order in which to complete them.

    A new pass halves the widest gap between passes, on the time scale on which a static schedule
    is evenly spaced; before the first and after the last one a gap counts half, for features of
    an earlier tick, or the last ones, serve there by choice. What a pass of the plan's own lacks
    was left out on purpose as well, and comes after as many new passes.
    """
    computed = plan == Reuse.COMPUTE
    share = computed.mean(axis=1)
    own = np.flatnonzero(computed.any(axis=1) & (share >= PASS_SHARE * share.max())).tolist()
    time = 1.0 - np.sqrt(1.0 - np.linspace(0.0, 1.0, len(plan)))
    distance = np.ones(len(plan))
    passes, order = [], []
    for step in own:
        passes.append(step)
        distance = np.minimum(distance, abs(time - time[step]))
    while len(passes) < len(plan):
        gap = distance.copy()
        if passes:
            gap[: min(passes)] /= 2
            gap[max(passes) :] /= 2
        gap[passes] = -1.0
        step = int(gap.argmax())
        passes.append(step)
        order.append(step)
        distance = np.minimum(distance, abs(time - time[step]))
    order[len(own) : len(own)] = own
    return [step for step in order if share[step] < 1.0]


def refined(plan: Plan, cells: int) -> Plan:
    """Plan with as many whole passes more as `cells` computed cells in all suffice for."""
    plan = plan.copy()
    for step in refinement_steps(plan):
        missing = int((plan[step] != Reuse.COMPUTE).sum())
        if missing > cells - int((plan == Reuse.COMPUTE).sum()):
            break
        plan[step] = Reuse.COMPUTE
    return plan
