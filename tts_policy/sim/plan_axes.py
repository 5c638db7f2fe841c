# SPDX-License-Identifier: Apache-2.0
"""Axes of a drawn plan: the residual blocks as the tick's report declares them, and the steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from matplotlib.collections import LineCollection

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
