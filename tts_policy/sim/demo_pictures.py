# SPDX-License-Identifier: Apache-2.0
"""Pictures of reuse plans: classes and colours, and plan.png.

A plan is drawn in the order in which it runs, like text: steps from top to bottom, within a step
blocks from left to right. Colours are Paul Tol's high-contrast set on grey, told apart by people
with any colour vision and in greyscale, the darkest for what costs most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from tts_policy.policy.plan import REUSE_COLOURS, Reuse, plan_rgb
from tts_policy.sim.demo_arms import Arm
from tts_policy.sim.plan_axes import PlanColumns, grid_lines, label_plan_axes

if TYPE_CHECKING:
    from tts_policy.sim.demo_driver import EpisodeRecord

# What every class means, in the order of `Reuse`.
MEANINGS = (
    'computed',
    'forward: last one of its kind, any layer',
    'timestep: same block, earlier step',
    'rollout: same cell, earlier tick',
)
INK, MUTED, GRID = '#1B2430', '#66717F', '#E4E8ED'
STYLE = {
    'font.family': 'DejaVu Sans',
    'font.size': 10,
    'text.color': INK,
    'axes.labelcolor': INK,
    'axes.edgecolor': MUTED,
    'axes.linewidth': 0.8,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'xtick.color': MUTED,
    'ytick.color': MUTED,
    'legend.frameon': False,
    'figure.facecolor': 'white',
}


@dataclass(frozen=True)
class PlanPanel:
    """One plan to draw: the tick of an episode (an index) and its report."""

    arm: Arm
    seed: int
    tick: int
    report: dict[str, Any]


def steady_tick(record: EpisodeRecord) -> int | None:
    """Index of a tick in the middle of an episode, never the first; None if there is no other."""
    ticks = len(record.ticks)
    return max(1, ticks // 2) if ticks > 1 else None


def class_legend(shares: dict[str, float] | None = None) -> list[Patch]:
    """Legend entries of the classes, with their shares if given."""
    entries = []
    for kind, colour, text in zip(Reuse, REUSE_COLOURS, MEANINGS, strict=True):
        share = '' if shares is None else f'  ({100 * shares[kind.name.lower()]:.1f} %)'
        entries.append(Patch(facecolor=colour, label=f'{text}{share}'))
    return entries


def _draw_panel(axes: Any, panel: PlanPanel) -> None:
    plan = np.asarray(panel.report['plan'])
    columns = PlanColumns.of(panel.report)
    axes.imshow(plan_rgb(plan), aspect='auto', interpolation='nearest')
    axes.add_collection(grid_lines(len(plan), columns))
    label_plan_axes(axes, len(plan), columns, 6.0, INK)
    axes.set_xlabel(f'residual block: kind, decoder layer\n({columns.legend})', labelpad=16)
    axes.set_ylabel('denoising step (0 is the noisiest)')
    computed = int((plan == 0).sum())
    axes.set_title(
        f'{panel.arm.sampler.label}: {100 * panel.report["sparsity"]:.1f} % reused, '
        f'{computed} of {plan.size} cells computed\n',
        loc='left',
        fontsize=12,
        fontweight='bold',
    )
    share = panel.report['flops'] / panel.report['dense_flops']
    axes.text(
        0.0,
        1.02,
        f'tick {panel.tick + 1} of seed {panel.seed}, {100 * share:.1f} % of the dense FLOPs, '
        f'{1e3 * panel.report["latency_s"]:.0f} ms',
        transform=axes.transAxes,
        color=MUTED,
        fontsize=9.5,
    )
    axes.legend(
        handles=class_legend(panel.report['reuse_mix']),
        loc='upper left',
        bbox_to_anchor=(0.0, -0.17),
        ncols=1,
        fontsize=9,
        handlelength=1.2,
        handleheight=1.2,
        borderaxespad=0.0,
    )


def write_plans(panels: Sequence[PlanPanel], path: Path) -> Path:
    """Draw the plans side by side."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2 * len(panels), 7.6), dpi=120)
        FigureCanvasAgg(figure)
        for column, panel in enumerate(panels):
            left = (column + 0.09) / len(panels)
            axes = figure.add_axes((left, 0.285, 0.87 / len(panels), 0.6))
            _draw_panel(axes, panel)
        figure.savefig(path)
    return path
