# SPDX-License-Identifier: Apache-2.0
"""report.html: one self-contained file with its pictures; the template escapes all text."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import jinja2
import matplotlib
import numpy as np
from numpy.typing import NDArray

from tts_policy.data.summary import Ticks, WorstTick, segments
from tts_policy.policy.contract import PolicyContract
from tts_policy.policy.plan import REUSE_COLOURS, Reuse, plan_rgb

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

SHOWN_TICKS = 60
MAP_ROWS = 300
SPARSE, DENSE, RECORDED = '#d55e00', '#0072b2', '#999999'


def write_report(
    out: Path,
    report: dict[str, Any],
    ticks: Ticks,
    folders: Sequence[Path],
    contract: PolicyContract,
) -> None:
    """Write out/report.html."""
    sparsities = [float(key) for key in report['sparsity']]
    chosen = report['knee'] if report['knee'] is not None else sparsities[-1]
    names = [Path(bag).name for bag in report['bags']]
    curves, plans = _shown_bag(report, folders, sparsities.index(chosen), contract)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals['format'] = format
    environment.filters['base64'] = lambda png: b64encode(png).decode()
    page = environment.get_template('report.html.j2').render(
        report=report,
        bag_names=names,
        served=', '.join(
            f'{float(s):g}'
            for s, row in report['sparsity'].items()
            if row['trained_for'] not in (None, float(s))
        ),
        chosen=str(chosen),
        shown_ticks=SHOWN_TICKS,
        error_against_sparsity=error_against_sparsity(report),
        error_of_ticks=error_of_ticks(ticks, sparsities, report['tolerance_rad']),
        curves=curves,
        plans=plans,
        worst=[
            {
                'image': camera_image(worst),
                'bag': names[ticks.bag[worst.row]],
                'seconds': ticks.stamp_ns[worst.row] * 1e-9,
                'errors': zip(report['sparsity'], ticks.l1[worst.row].mean(-1), strict=True),
            }
            for worst in ticks.worst
        ],
    )
    (out / 'report.html').write_text(page, encoding='utf-8')


def _shown_bag(
    report: dict[str, Any], folders: Sequence[Path], at: int, contract: PolicyContract
) -> tuple[bytes | None, bytes | None]:
    """Joint curves and plan heat map of the first bag that has ticks."""
    for folder in folders:
        for path in segments(folder):
            with np.load(path) as data:
                stamps = data['stamp_ns'][:SHOWN_TICKS]
                actions = data['actions'][:SHOWN_TICKS]
                curves = {
                    'dense': actions[:, 0],
                    'sparse': actions[:, 1 + at],
                    'recorded': data['future'][:SHOWN_TICKS],
                }
                plans = data['plan'][:SHOWN_TICKS, at]
            execute = report['n_execute'] or contract.action.execute
            return joint_curves(
                stamps, curves, contract.action.joints, contract.observation.period_s, execute
            ), plan_heat_map(plans)
    return None, None


def _png(figure: Any) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format='png', dpi=110, bbox_inches='tight')
    plt.close(figure)
    return buffer.getvalue()


def error_against_sparsity(report: dict[str, Any]) -> bytes:
    """L1 error, mean and 95th percentile, and cost, at every sparsity."""
    rows = report['sparsity']
    x = [float(key) for key in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
    left.plot(x, [row['l1_p95_rad'] for row in rows.values()], 'o-', label='95th percentile')
    left.plot(x, [row['l1_mean_rad'] for row in rows.values()], 'o-', label='mean')
    left.axhline(report['tolerance_rad'], color='k', ls=':', label='tolerance')
    if report['knee'] is not None:
        left.axvline(report['knee'], color=SPARSE, ls='--', label='recommended')
    left.set(xlabel='sparsity', ylabel='L1 to dense, rad')
    left.legend()
    right.plot(x, [100 * row['flops_ratio'] for row in rows.values()], 'o-', color=DENSE)
    right.set(xlabel='sparsity', ylabel='FLOPs, % of dense', ylim=(0, None))
    twin = right.twinx()
    twin.plot(x, [row['latency_ms'] for row in rows.values()], 's--', color=SPARSE)
    twin.set(ylabel='median latency, ms (dashed)', ylim=(0, None))
    figure.tight_layout()
    return _png(figure)


def error_of_ticks(ticks: Ticks, sparsities: Sequence[float], tolerance: float) -> bytes:
    """Share of ticks below an error, and mean error over the ticks of an episode, per sparsity."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
    errors, steady, since_reset = ticks.l1.mean(-1), ticks.steady, ticks.since_reset
    count = np.bincount(since_reset)
    for at, sparsity in enumerate(sparsities):
        ordered = np.sort(errors[steady, at])
        share = 100 * np.arange(1, len(ordered) + 1) / len(ordered)
        (line,) = left.step(ordered, share, where='post', label=f'{sparsity:g}')
        mean = np.bincount(since_reset, errors[:, at]) / np.maximum(count, 1)
        right.plot(mean, '.-', lw=0.9, color=line.get_color(), label=f'{sparsity:g}')
    left.axvline(tolerance, color='k', ls=':')
    left.axhline(95, color='k', ls=':')
    left.set(xlabel='L1 to dense, rad', ylabel='ticks below it, %', xlim=(0, None))
    left.locator_params(axis='x', nbins=6)
    left.legend(title='sparsity', loc='lower right', fontsize='small')
    right.set(xlabel='tick of its episode', ylabel='mean L1 to dense, rad', ylim=(0, None))
    figure.tight_layout()
    return _png(figure)


def joint_curves(
    stamps_ns: NDArray[np.int64],
    curves: dict[str, NDArray[np.float64]],
    joints: Sequence[str],
    period_s: float,
    execute: int,
) -> bytes:
    """Executed set-points of consecutive ticks over time, one panel per joint.

    curves: dense, sparse and recorded, each [ticks, T - To + 1, A].
    """
    columns = 2 if len(joints) > 1 else 1
    rows = -(-len(joints) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(10, 1.6 * rows), sharex=True, squeeze=False
    )
    start_s = stamps_ns[0] * 1e-9
    times = stamps_ns[:, None] * 1e-9 - start_s + period_s * np.arange(execute)
    styles = {'recorded': (RECORDED, 3.0), 'dense': (DENSE, 1.2), 'sparse': (SPARSE, 0.9)}
    for j, name in enumerate(joints):
        panel = axes[j // columns][j % columns]
        for label, (colour, width) in styles.items():
            panel.plot(
                times.ravel(),
                curves[label][:, :execute, j].ravel(),
                color=colour,
                lw=width,
                label=label,
            )
        panel.set_ylabel(name.replace('$', r'\$'), fontsize='small')
    axes[0][0].legend(fontsize='small', ncols=3)
    for panel in axes[-1]:
        panel.set_xlabel('s')
    figure.tight_layout()
    return _png(figure)


def plan_heat_map(plans: NDArray[np.int8]) -> bytes:
    """Classes of every cell (rows, step-major) at every tick (columns); plans [ticks, K, N].

    Where there are more cells than rows to show, a row has the mean colour of its cells.
    """
    ticks, steps, blocks = plans.shape
    cells = plan_rgb(plans.reshape(ticks, -1).T)
    if len(cells) > MAP_ROWS:
        cells = cv2.resize(cells, (ticks, MAP_ROWS), interpolation=cv2.INTER_AREA)
    figure, axes = plt.subplots(figsize=(10, 3.6))
    axes.imshow(
        cells,
        aspect='auto',
        interpolation='nearest',
        extent=(-0.5, ticks - 0.5, steps * blocks - 0.5, -0.5),
    )
    every = max(1, steps // 10)
    axes.set_yticks(np.arange(0, steps, every) * blocks, [str(s) for s in range(0, steps, every)])
    axes.set(xlabel='tick', ylabel='denoising step')
    handles = [Patch(color=REUSE_COLOURS[kind], label=kind.name.lower()) for kind in Reuse]
    axes.legend(handles=handles, loc='upper left', bbox_to_anchor=(1, 1))
    return _png(figure)


def camera_image(worst: WorstTick) -> bytes:
    """The newest camera image of a tick."""
    buffer = BytesIO()
    plt.imsave(buffer, worst.image, format='png')
    return buffer.getvalue()
