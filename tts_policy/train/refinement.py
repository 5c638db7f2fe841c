# SPDX-License-Identifier: Apache-2.0
"""How a plan gets denser: by whole passes between those that it has, not by single cells.

A cell computed alone among reused ones mixes features of different noise levels; many of them,
chosen by what each promises by itself, make a plan worse than the one they were added to. A whole
pass more is what a static schedule with more steps has, and is rarely worse. Where cells are left
that do not make a pass, the last one is partial.
"""

from __future__ import annotations

import numpy as np

from tts_policy.policy.plan import Plan, Reuse, static_time

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
    time = static_time(len(plan))
    distance = abs(time[:, None] - time[own]).min(axis=1, initial=1.0)
    passes = list(own)
    while len(passes) < len(plan):
        gap = distance.copy()
        if passes:
            gap[: min(passes)] /= 2
            gap[max(passes) :] /= 2
        gap[passes] = -1.0
        passes.append(int(gap.argmax()))
        distance = np.minimum(distance, abs(time - time[passes[-1]]))
    new = passes[len(own) :]
    order = [*new[: len(own)], *own, *new[len(own) :]]
    return [step for step in order if share[step] < 1.0]


def refined(plan: Plan, cells: int) -> Plan:
    """Plan with as many whole passes more as `cells` computed cells in all suffice for."""
    dense, left = plan.copy(), cells - int((plan == Reuse.COMPUTE).sum())
    for step in refinement_steps(plan):
        left -= int((plan[step] != Reuse.COMPUTE).sum())
        if left < 0:
            break
        dense[step] = Reuse.COMPUTE
    return dense
