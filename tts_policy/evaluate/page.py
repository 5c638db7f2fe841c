# SPDX-License-Identifier: Apache-2.0
"""The page that shows an evaluation: claims and whether they hold, tables, and the plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tts_policy.evaluate.results import Row
from tts_policy.evaluate.variants import REFERENCE

INTRODUCTION = """# Results: success against cost

`evaluate_policy` wrote this page from the measurements in `results.json`; nothing is typed in.

- Every variant of a task runs the same seeds. The noise is that of the bundle, which may be none,
  unless the variant names its own (held, fresh, noiseless).
- *Steady* leaves out the dense first tick of every episode; *episode* includes it.
- GFLOPs count the conditional encoder, the pruner and the executed decoder. The observation
  encoder costs the same in all variants; its cost stands above each table.
- FE, dense forward equivalents, are the computed cells over the blocks of one forward pass.
- L1 is the action error in normalised units against the dense chunk of the same sampler and noise,
  on expert episodes. Push-T has no expert, so its episodes are dense ones; its score is the
  largest reward of an episode, averaged over episodes.
- Won and lost count the seeds on which only the variant, or only the dense reference (DDPM-100, or
  ten Euler steps for a flow), succeeded. Their test is McNemar's, exact; the interval of the
  difference is Bonett and Price's.
- Latencies are medians over steady ticks of the whole policy call on one thread. The variants of a
  task took turns, tick by tick. One with ~ was timed while its episodes ran, beside whatever else
  the machine did.
- A variant that comes to the same as another one has no row. Where the plans of a pruner are
  constant, their mean and those of another tick's memory are the learned plan itself. Where the
  samplers of a bundle leave step 0 free, "+free" changes nothing.

![Success against cost](pareto.png)
"""
HEADLINES = ('ddim10:learned:0.8', 'ddpm100:learned:0.95')
Variants = Mapping[str, Row]


def write_page(rows: Sequence[Row], path: Path) -> None:
    """Write the Markdown page."""
    tasks = list(dict.fromkeys(row['task'] for row in rows))
    parts = [INTRODUCTION, '## What was to be shown', _claims_table(rows, tasks)]
    for task in tasks:
        of = [row for row in rows if row['task'] == task]
        devices = ', '.join(dict.fromkeys(row['device'] for row in of))
        turns = dict.fromkeys(
            '{ticks} ticks in turns on {device}'.format(**row['latency_in_turns'])
            for row in of
            if 'latency_in_turns' in row
        )
        timed = ', '.join(turns) or 'while episodes ran'
        parts += [
            f'## {task.capitalize()}',
            f'{devices}; one thread a process. Latency: {timed}. '
            f'Observation encoder: {of[0]["gflops_observation"]:.3f} GFLOPs a tick.',
            markdown_table(of),
        ]
    path.write_text('\n\n'.join(part.strip() for part in parts) + '\n')


def markdown_table(rows: Sequence[Row]) -> str:
    """Table of rows of one task."""
    lines = [
        '| variant | success | 95 % | against dense: won/lost, 95 % of the difference, p '
        '| reused | L1 | GFLOPs, steady / episode | FE, steady / episode | latency p50 |',
        '| --- | --- | --- | --- | --- | --- | --- | --- | --- |',
    ]
    for row in rows:
        low, high = (f'{100 * bound:.1f}' for bound in row['ci95'])
        paired, against = row.get('paired'), ''
        if paired:
            bounds = ' to '.join(f'{100 * bound:+.1f}' for bound in paired['difference_ci95'])
            against = f'{paired["won"]}/{paired["lost"]}, {bounds}, p {row["p_value"]:.3g}'
        error = '' if row['l1_error'] is None else f'{row["l1_error"]:.3f}'
        score = f', score {row["score"]:.3f}' if 'score' in row else ''
        latency = f'{"" if "latency_in_turns" in row else "~"}{row["latency_ms"]:.0f} ms'
        lines.append(
            f'| {row["variant"]} | {row["successes"]}/{row["episodes"]}{score} '
            f'| {low} - {high} | {against} '
            f'| {100 * row["sparsity"]:.1f} % | {error} '
            f'| {row["gflops_tick"]:.3f} / {row["gflops_tick_episode"]:.3f} '
            f'| {row["fe_steady"]:.2f} / {row["fe_episode"]:.2f} | {latency} |'
        )
    return '\n'.join(lines)


def _claims_table(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    lines = ['| task | claim | measured | holds |', '| --- | --- | --- | --- |']
    for task in tasks:
        variants = {row['variant']: row for row in rows if row['task'] == task}
        for claim, measured, holds in claims(variants):
            verdict = 'not measured' if holds is None else ('yes' if holds else '**no**')
            lines.append(f'| {task} | {claim} | {measured} | {verdict} |')
    return '\n'.join(lines)


def claims(variants: Variants) -> Iterator[tuple[str, str, bool | None]]:
    """Claims about one task: text, what was measured, and whether it holds (None: no data)."""
    for name in HEADLINES:
        yield _as_good_as_dense(variants, name)
    yield _better(variants, HEADLINES[0], 'ddim3')
    yield _cheaper(variants, HEADLINES[1])
    for name in HEADLINES:
        yield _closer_than_static(variants, name)
    for scheduler in ('ddim10', 'ddpm100'):
        yield _monotone(variants, scheduler)


def _rate(row: Row) -> float:
    return float(row['successes'] / row['episodes'])


def _as_good_as_dense(variants: Variants, name: str) -> tuple[str, str, bool | None]:
    claim = f'{name}: at most 2 points below {REFERENCE}, paired lower bound above -6'
    if name not in variants or 'paired' not in variants[name]:
        return claim, '', None
    paired = variants[name]['paired']
    difference = 100 * (paired['won'] - paired['lost']) / paired['episodes']
    low = 100 * paired['difference_ci95'][0]
    measured = f'{difference:+.1f} points, lower bound {low:+.1f}, {paired["episodes"]} pairs'
    return claim, measured, difference >= -2.0 and low > -6.0


def _better(variants: Variants, name: str, other: str) -> tuple[str, str, bool | None]:
    claim = f'{name}: above {other} dense'
    if name not in variants or other not in variants:
        return claim, '', None
    measured = ' against '.join(
        f'{100 * _rate(variants[variant]):.1f} %' for variant in (name, other)
    )
    return claim, measured, _rate(variants[name]) > _rate(variants[other])


def _cheaper(variants: Variants, name: str) -> tuple[str, str, bool | None]:
    claim = f'{name}: at least 92 % fewer GFLOPs than {REFERENCE}, steady state'
    if name not in variants or REFERENCE not in variants:
        return claim, '', None
    saved = 100 * (1 - variants[name]['gflops_tick'] / variants[REFERENCE]['gflops_tick'])
    return claim, f'{saved:.2f} % fewer', saved >= 92.0


def _closer_than_static(variants: Variants, name: str) -> tuple[str, str, bool | None]:
    """Compare with the cheapest static schedule that costs as much: they come in whole steps."""
    claim = f'{name}: L1 at most 0.6 of a static plan that costs no less'
    one = variants.get(name)
    statics = [
        row
        for variant, row in variants.items()
        if variant.startswith(f'{name.split(":")[0]}:static:') and row['l1_error']
    ]
    if one is None or one['l1_error'] is None or not statics:
        return claim, '', None
    dear = [row for row in statics if row['gflops_tick'] >= 0.99 * one['gflops_tick']]
    other = min(dear or statics, key=lambda row: abs(row['gflops_tick'] - one['gflops_tick']))
    ratio = one['l1_error'] / other['l1_error']
    cost = one['gflops_tick'] / other['gflops_tick']
    measured = f'L1 ratio {ratio:.2f}, GFLOPs ratio {cost:.2f} ({other["variant"]})'
    return claim, measured, ratio <= 0.6 and cost <= 1.01


def _monotone(variants: Variants, scheduler: str) -> tuple[str, str, bool | None]:
    """Success must not rise with sparsity by more than the intervals allow."""
    claim = f'{scheduler}:learned: success falls as sparsity rises, within the intervals'
    points = _points(variants, f'{scheduler}:learned:')
    if len(points) < 3:
        return claim, '', None
    measured = ', '.join(f'{s:g}: {100 * _rate(row):.0f} %' for s, row in points)
    holds = all(
        later['ci95'][0] <= earlier['ci95'][1]
        for index, (_, earlier) in enumerate(points)
        for _, later in points[index + 1 :]
    )
    return claim, measured, holds


def _points(variants: Variants, prefix: str) -> list[tuple[float, Row]]:
    plain = [
        (float(name.removeprefix(prefix)), row)
        for name, row in variants.items()
        if name.startswith(prefix) and '+' not in name
    ]
    return sorted(plain, key=lambda point: point[0])


def _family(row: Row) -> str:
    """Group of variants that share a colour: dense ones by scheduler, sparse ones by plan."""
    _, _, plan = row['variant'].partition(':')
    if not plan:
        return f'dense {row["scheduler"].upper()}'
    return f'{row["scheduler"].upper()}-{row["steps"]} {plan.partition(":")[0]}'


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """Draw success against executed GFLOPs and against latency, one line of axes per task.

    Latencies measured in turns are not drawn beside those of episodes that ran with other work.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Options such as +execute2 make another task, or another plan at the same price.
    shown = [row for row in rows if '+' not in row['variant']] or list(rows)
    tasks = list(dict.fromkeys(row['task'] for row in shown))
    figure = Figure(figsize=(13, 4.6 * len(tasks)), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(tasks), 2, squeeze=False, sharey=True)
    families = list(dict.fromkeys(_family(row) for row in shown))
    for (cost, latency), task in zip(axes, tasks, strict=True):
        of = [row for row in shown if row['task'] == task]
        in_turns = [row for row in of if 'latency_in_turns' in row] or of
        _draw(cost, of, 'gflops_tick', families)
        _draw(latency, in_turns, 'latency_ms', families)
        cost.set(xlabel='executed GFLOPs a tick, steady state', title=task)
        latency.set(xlabel='latency p50 of a steady tick [ms]', title=task)
        cost.set_ylabel('success rate, 95 % Wilson interval')
    handles: dict[str, Any] = {}
    for axis in axes[:, 0]:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, fontsize=8, loc='outside right upper')
    figure.savefig(path, dpi=110)


def _draw(axis: Any, rows: Sequence[Row], key: str, families: Sequence[str]) -> None:
    """Draw success against `key`, one colour per family; colours repeat after ten families."""
    for number, family in enumerate(families):
        points = sorted((r for r in rows if _family(r) == family), key=lambda row: row[key])
        if not points:
            continue
        rate = np.array([p['successes'] / p['episodes'] for p in points])
        low, high = np.array([p['ci95'] for p in points]).T
        style = 's' if family.startswith('dense') else 'o^'[number >= 10]
        axis.errorbar(
            [p[key] for p in points],
            rate,
            yerr=np.maximum([rate - low, high - rate], 0),
            fmt=f'{style}-',
            color=f'C{number % 10}',
            capsize=2,
            alpha=0.85,
            label=family,
        )
    axis.set(xscale='log', ylim=(-0.03, 1.03))
    axis.grid(alpha=0.3)
