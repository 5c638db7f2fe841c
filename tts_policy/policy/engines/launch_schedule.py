# SPDX-License-Identifier: Apache-2.0
"""Which captured units a plan launches, in which order; plain logic, the same on every device.

A run of consecutive reused blocks is one unit that adds up stored features. Which features comes
from a table that the device reads row by row, so that the units are the same for every plan.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tts_policy.policy.plan import Plan, Reuse, resolve_sources

_NOTHING = -1


@dataclass(frozen=True)
class LaunchSchedule:
    """Launches of a plan's steps, and what its runs of reused blocks add up.

    units: numbers in the order of launch: b < N computes residual block b, N + 0 adds a run, N + 1
    ends a step, N + 2 is a whole reused step, both in one. runs: [R, N], by block, the cell of the
    store that the run's feature comes from, K * N (a row of zeros) for blocks outside of it.
    """

    units: list[int]
    runs: NDArray[np.int64]


def launch_schedule(plan: Plan, kinds: NDArray[np.int64], first: int) -> LaunchSchedule:
    """Schedule the steps from `first` on of a plan [K, N] of blocks of these kinds [N].

    Raises
    ------
    PlanError
        if the plan reuses what does not exist.

    """
    steps, blocks = plan.shape
    add, end, reused_step = blocks, blocks + 1, blocks + 2
    sources = resolve_sources(plan, kinds)[first:]
    reused = plan[first:] != Reuse.COMPUTE
    opens = reused.copy()
    opens[:, 1:] &= ~reused[:, :-1]
    units = np.full((steps - first, blocks + 1), _NOTHING)
    units[:, :blocks] = np.where(reused, np.where(opens, add, _NOTHING), np.arange(blocks))
    units[:, blocks] = end
    whole = reused.all(axis=1)
    units[whole] = _NOTHING
    units[whole, blocks] = reused_step
    number = np.cumsum(opens).reshape(opens.shape) - 1
    runs = np.full((int(opens.sum()), blocks), plan.size)
    step, block = np.nonzero(reused)
    runs[number[step, block], block] = sources[step, block]
    return LaunchSchedule(units[units != _NOTHING].tolist(), runs)
