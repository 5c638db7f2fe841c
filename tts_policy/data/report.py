# SPDX-License-Identifier: Apache-2.0
"""report.html: one file that needs nothing else; every string in it is escaped."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from tts_policy.data import plots
from tts_policy.data.summary import Ticks, segments
from tts_policy.policy.contract import PolicyContract

SHOWN_TICKS = 60
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 68em; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
tr.knee { background: #fff3d6; font-weight: 600; }
.bad { color: #a40000; }
img { max-width: 100%; }
figure { display: inline-block; margin: .4em; vertical-align: top; }
figcaption { font-size: .85em; max-width: 19em; }
figure img { width: 16em; image-rendering: pixelated; }
"""


def _image(png: bytes, alternative: str) -> str:
    data = b64encode(png).decode()
    return f'<img alt="{escape(alternative)}" src="data:image/png;base64,{data}">'


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]], marked: int | None = None) -> str:
    lines = ['<tr>' + ''.join(f'<th>{escape(name)}</th>' for name in header) + '</tr>']
    for number, row in enumerate(rows):
        mark = ' class="knee"' if number == marked else ''
        lines.append(f'<tr{mark}>' + ''.join(f'<td>{escape(str(v))}</td>' for v in row) + '</tr>')
    return '<table>' + '\n'.join(lines) + '</table>'


def _show(value: float | None, digits: str = '.4f') -> str:
    return '–' if value is None else format(value, digits)


def _sparsity_table(report: dict[str, Any]) -> str:
    rows, marked = [], None
    for number, (sparsity, row) in enumerate(report['sparsity'].items()):
        if report['knee'] is not None and float(sparsity) == report['knee']:
            marked = number
        rows.append(
            [
                sparsity,
                _show(row['trained_for'], 'g'),
                _show(row['l1_mean_rad']),
                _show(row['l1_p95_rad']),
                _show(row['max_p95_rad'], '.3f'),
                _show(row['max_rad'], '.3f'),
                _show(row['recorded_l1_rad']),
                f'{100 * row["realised_sparsity"]:.1f} %',
                f'{100 * row["flops_ratio"]:.1f} %',
                _show(row['latency_ms'], '.1f'),
                ' / '.join(f'{100 * share:.0f}' for share in row['reuse_mix'].values()),
                row['oldest_rollout_ticks'],
            ]
        )
    header = ['sparsity', 'trained for', 'L1 mean', 'L1 95th', 'max 95th', 'max']
    header += ['L1 to recorded', 'realised', 'FLOPs', 'latency ms']
    header += ['compute / forward / timestep / rollout %', 'oldest rollout']
    return _table(header, rows, marked)


def _served(report: dict[str, Any]) -> str:
    """What the pruner was trained for, and what its sampler cannot do."""
    others = [
        f'{float(s):g}'
        for s, row in report['sparsity'].items()
        if row['trained_for'] not in (None, float(s))
    ]
    text = ''
    if others:
        text += f'The pruner was not trained for {", ".join(others)}: the nearest table serves. '
    if report['left_out']:
        asked = ', '.join(f'{s:g}' for s in report['left_out'])
        text += f'{asked} left out: above what the sampler {report["sampler"]} can do.'
    return f'<p>{escape(text)}</p>' if text else ''


def _joint_table(report: dict[str, Any]) -> str:
    key = str(report['knee']) if report['knee'] is not None else list(report['sparsity'])[-1]
    joints = report['sparsity'][key]['joints']
    rows = [
        [name, _show(v['l1_mean'], '.5f'), _show(v['max']), _show(v['recorded_l1'])]
        for name, v in joints.items()
    ]
    return f'<h3>Joints at sparsity {escape(key)}</h3>' + _table(
        ['joint', 'L1 mean', 'max', 'L1 to recorded'], rows
    )


def _shown_bag(
    report: dict[str, Any], folders: Sequence[Path], at: int, contract: PolicyContract
) -> tuple[bytes, bytes] | None:
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
            return plots.joint_curves(
                stamps, curves, contract.action.joints, contract.observation.period_s, execute
            ), plots.plan_heat_map(plans)
    return None


def _worst(report: dict[str, Any], ticks: Ticks) -> str:
    figures = []
    for worst in ticks.worst:
        errors = ', '.join(
            f'{s}: {ticks.l1[worst.row, at].mean():.3f}' for at, s in enumerate(report['sparsity'])
        )
        caption = (
            f'{Path(report["bags"][ticks.bag[worst.row]]).name}, '
            f'{ticks.stamp_ns[worst.row] * 1e-9:.3f} s. L1 {errors}'
        )
        image = _image(plots.camera_image(worst), 'camera at a tick with a large error')
        figures.append(f'<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>')
    return ''.join(figures)


def _verdict(report: dict[str, Any]) -> str:
    tolerance = f'{report["tolerance_rad"]:g} rad'
    if report['knee'] is None:
        return f'No sparsity asked for keeps its 95th-percentile error under {tolerance}.'
    return (
        f'Recommended sparsity {report["knee"]:g}: the highest asked for whose 95th-percentile '
        f'error stays under {tolerance}.'
    )


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
    shown = _shown_bag(report, folders, sparsities.index(chosen), contract)
    problems = ''.join(f'<li class="bad">{escape(text)}</li>' for text in report['problems'])
    bags = report['bags']
    parts = [
        f'<h1>{escape(Path(bags[0]).name)}{f" and {len(bags) - 1} more" if bags[1:] else ""}</h1>',
        f'<p>{report["ticks"]} ticks of {len(bags)} recordings, sampler '
        f'{escape(report["sampler"])}. <b>{_verdict(report)}</b></p>',
        f'<h2>Problems</h2><ul>{problems}</ul>' if problems else '',
        '<h2>Sparse against dense</h2>',
        _sparsity_table(report),
        _served(report),
        '<p>Errors in rad (m for a finger), same noise in every arm: L1 is the mean over the '
        'set-points of a chunk and the joints, max the largest of them, 95th the 95th percentile '
        'over ticks. '
        'The first tick of an episode is dense in every arm: it is left out of errors, '
        'realised sparsity, FLOPs and latency.</p>',
        _image(plots.error_against_sparsity(report), 'error and cost against sparsity'),
        _image(
            plots.error_of_ticks(ticks, sparsities, report['tolerance_rad']),
            'distribution of errors, and errors over the ticks of an episode',
        ),
        _joint_table(report),
    ]
    if shown is not None:
        parts += [
            f'<h2>Set-points and plans at sparsity {chosen:g}</h2>',
            f'<p>The first {SHOWN_TICKS} ticks at most of the first recording.</p>',
            _image(shown[0], 'executed set-points per joint'),
            _image(shown[1], 'plan of every tick'),
        ]
    if ticks.worst:
        parts += ['<h2>Ticks that sparsity changed most</h2>', _worst(report, ticks)]
    parts += ['<h2>Recordings</h2><ul>', *(f'<li>{escape(bag)}</li>' for bag in bags), '</ul>']
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Bag evaluation</title>'
        f'<style>{STYLE}</style></head><body>{"".join(parts)}</body></html>'
    )
    (out / 'report.html').write_text(page, encoding='utf-8')
