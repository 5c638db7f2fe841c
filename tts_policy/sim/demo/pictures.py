# SPDX-License-Identifier: Apache-2.0
"""Pictures of reuse plans: their axes and legend, the look of every picture, and plan.png.

A plan is drawn in the order in which it runs, like text: steps from top to bottom, within a step
blocks from left to right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from tts_policy.policy.plan import REUSE_COLOURS, Reuse, plan_rgb
from tts_policy.sim.demo.variants import Variant

if TYPE_CHECKING:
    from tts_policy.sim.demo.driver import EpisodeRecord

MOST_RULED_STEPS = 25


@dataclass(frozen=True)
class PlanColumns:
    """Residual blocks of a plan's N columns: symbols of their kinds, decoder layers from 0 on.

    kinds: the name of every symbol.
    """

    symbols: tuple[str, ...]
    layers: tuple[int, ...]
    kinds: Mapping[str, str]

    @staticmethod
    def of(report: Mapping[str, Any]) -> PlanColumns:
        """Columns of the plan in a report of ~/chunk_stats."""
        blocks = report['blocks']
        return PlanColumns(tuple(blocks['symbols']), tuple(blocks['layers']), blocks['kinds'])

    @property
    def legend(self) -> str:
        """What the symbols stand for."""
        return ', '.join(f'{symbol} {name}' for symbol, name in self.kinds.items())

    @property
    def centres(self) -> dict[int, float]:
        """Column in the middle of every layer."""
        columns = range(len(self.layers))
        return {
            layer: sum(group) / len(group)
            for layer, group in (
                (layer, list(of)) for layer, of in groupby(columns, lambda b: self.layers[b])
            )
        }

    def begins_layer(self, column: int) -> bool:
        """Whether the block before belongs to another layer."""
        return self.layers[column] != self.layers[column - 1]


def grid_lines(steps: int, columns: PlanColumns) -> LineCollection:
    """White lines between the cells of a plan, heavier between layers; none between thin rows."""
    blocks = len(columns.symbols)
    rows = [[(-0.5, i - 0.5), (blocks - 0.5, i - 0.5)] for i in range(1, steps)]
    if steps > MOST_RULED_STEPS:
        rows = []
    lines = [[(b - 0.5, -0.5), (b - 0.5, steps - 0.5)] for b in range(1, blocks)]
    widths = [1.2] * len(rows)
    widths += [2.6 if columns.begins_layer(b) else 0.9 for b in range(1, blocks)]
    return LineCollection(rows + lines, colors='white', linewidths=widths)


def label_plan_axes(
    axes: Any, steps: int, columns: PlanColumns, kinds_size: float, ink: str
) -> None:
    """Name the axes of a plan: kinds of the blocks, their layers below, steps at the side."""
    blocks = len(columns.symbols)
    axes.set_xlim(-0.5, blocks - 0.5)
    axes.set_ylim(steps - 0.5, -0.5)
    axes.set_xticks(range(blocks), columns.symbols)
    axes.tick_params(axis='x', length=0, pad=2, labelsize=kinds_size)
    every = 1 if steps <= 12 else 10
    axes.set_yticks(range(0, steps, every))
    axes.tick_params(axis='y', length=0, pad=3, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    layers = axes.secondary_xaxis(location=0)
    layers.spines['bottom'].set_visible(False)
    centres = columns.centres
    layers.set_xticks(list(centres.values()), [str(1 + layer) for layer in centres])
    layers.tick_params(axis='x', length=0, pad=6 + 1.3 * kinds_size, labelsize=8.5, labelcolor=ink)


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

    variant: Variant
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
        f'{panel.variant.sampler.label}: {100 * panel.report["sparsity"]:.1f} % reused, '
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
