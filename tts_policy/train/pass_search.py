# SPDX-License-Identifier: Apache-2.0
"""Where to place whole passes: a static schedule whose passes move to the steps that matter most.

Between passes every block keeps its last feature. At which steps a few passes happen decides more
than which single cells are exchanged afterwards, and no exchange of cells finds it: a pass that
moves by a step is many cells that are all needed at both places. Pattern search by coordinates
(Hooke and Jeeves 1961): every pass moves by a stride while that helps; where none does any more,
the stride is halved.
"""

from __future__ import annotations

from collections.abc import Callable

from tts_policy.policy.plan import static_steps

# The first stride is this share of the steps.
REACH = 0.16


def placed_passes(
    error: Callable[[list[int]], float], steps: int, count: int, force_first_step: bool
) -> tuple[list[int], float]:
    """`count` steps out of `steps` whose error is the least in their neighbourhood, and it.

    error: of whole passes at steps in ascending order. The search begins with a static schedule
    and only ever gets better; a forced first step stays where it is.
    """
    passes = static_steps(steps, count).tolist()
    best = error(passes)
    stride = max(1, round(REACH * steps))
    while stride:
        before = best
        for index in range(int(force_first_step), len(passes)):
            for change in (stride, -stride):
                while (moved := _moved(passes, index, change, steps)) is not None:
                    trial = error(moved)
                    if trial >= best:
                        break
                    passes, best = moved, trial
        if best == before:
            stride //= 2
    return passes, best


def _moved(passes: list[int], index: int, change: int, steps: int) -> list[int] | None:
    """Passes with one elsewhere, None if that is past a neighbour or out of the steps."""
    before = passes[index - 1] if index else -1
    after = passes[index + 1] if index + 1 < len(passes) else steps
    step = passes[index] + change
    return [*passes[:index], step, *passes[index + 1 :]] if before < step < after else None
