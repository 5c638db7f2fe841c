# SPDX-License-Identifier: Apache-2.0
"""Statistics and pages of an evaluation, on made-up episodes."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip('mujoco', reason='mujoco is not installed')

from tts_policy.evaluate.page import claims, write_page, write_plot
from tts_policy.evaluate.results import (
    Row,
    collect_rows,
    compared,
    make_row,
    mcnemar_exact,
    paired_difference,
    row_seeds,
    wilson_interval,
    write_rows,
)
from tts_policy.evaluate.variants import Variant


def episode(success: bool, fe: list[float], gflops: list[float]) -> dict[str, Any]:
    return {
        'success': success,
        'ticks': len(fe),
        'latency_ms': [10.0 * value for value in fe],
        'gflops': gflops,
        'fe': fe,
        'mix': {'compute': 0.2, 'forward': 0.1, 'timestep': 0.3, 'rollout': 0.4},
        'oldest': 3,
        'device': 'a processor',
        'observation_gflops': 0.5,
        'digest': 'd',
    }


def episodes(wins: set[int], fe: float, count: int = 100) -> dict[int, dict[str, Any]]:
    dense = 100.0 if fe > 10 else 10.0
    return {s: episode(s in wins, [dense, fe, fe], [1.0, fe / 10, fe / 10]) for s in range(count)}


DENSE = make_row('lift', Variant.parse('ddpm100'), episodes(set(range(98)), 100.0), None)


def row(name: str, wins: set[int], fe: float, error: float | None = None) -> Row:
    made = make_row('lift', Variant.parse(name), episodes(wins, fe), error)
    return compared(made, DENSE)


def test_wilson_interval_of_textbook_values() -> None:
    assert wilson_interval(95, 100) == pytest.approx((0.8882, 0.9785), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


def test_exact_mcnemar_of_textbook_values() -> None:
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(5, 5) == 1.0
    assert mcnemar_exact(1, 9) == pytest.approx(2 * 11 / 2**10)
    assert mcnemar_exact(9, 1) == mcnemar_exact(1, 9)
    assert mcnemar_exact(0, 6) == pytest.approx(2 / 2**6)


def test_the_paired_interval_is_symmetric_and_shrinks_with_more_pairs() -> None:
    low, high = paired_difference(3, 3, 200)
    assert low == pytest.approx(-high) and -0.03 < low < -0.01
    few, many = paired_difference(0, 0, 10), paired_difference(0, 0, 1000)
    assert many[1] - many[0] < few[1] - few[0]
    # Bonett and Price with 2 lost of 50: (1 - 3) / 52 -+ 1.96 sqrt((4/52 - (2/52)^2) / 52).
    assert paired_difference(0, 2, 50) == pytest.approx((-0.1131, 0.0362), abs=2e-4)


def test_a_row_tells_steady_state_from_the_episode() -> None:
    made = row('ddim10:learned:0.8', set(range(95)), 2.0, 0.04123)
    assert (made['episodes'], made['successes'], made['l1_error']) == (100, 95, 0.0412)
    assert (made['fe_steady'], made['fe_episode'], made['sparsity']) == (2.0, 4.667, 0.8)
    assert (made['gflops_tick'], made['gflops_tick_episode']) == (0.2, 0.4667)
    assert made['latency_ms'] == 20.0
    assert made['failed_seeds'] == [95, 96, 97, 98, 99]
    assert (made['paired']['won'], made['paired']['lost']) == (0, 3)
    assert made['p_value'] == 0.25


def test_the_reference_is_not_compared_with_itself() -> None:
    assert 'paired' not in row('ddpm100', set(range(98)), 100.0)
    assert Variant.parse('ddim10:learned:0.8+fresh+execute4').reference == 'ddpm100+execute4'


def verdicts(rows: list[Row]) -> dict[str, bool | None]:
    return {claim: holds for claim, _, holds in claims({r['variant']: r for r in rows})}


def test_claims_hold_fail_or_are_not_measured() -> None:
    dense = row('ddpm100', set(range(98)), 100.0)
    good = row('ddim10:learned:0.8', set(range(97)), 2.0, 0.03)
    bad = row('ddpm100:learned:0.95', set(range(80)), 5.0, 0.05)
    rows = [dense, good, bad, row('ddim3', set(range(70)), 3.0)]
    rows += [
        row('ddim10:static:0.8', set(), 2.0, 0.06),
        row('ddpm100:static:0.95', set(), 5, 0.06),
    ]
    of = verdicts(rows)
    assert of['ddim10:learned:0.8: at most 2 points below ddpm100, paired lower bound above -6']
    assert of['ddim10:learned:0.8: above ddim3 dense']
    assert of['ddpm100:learned:0.95: at least 92 % fewer GFLOPs than ddpm100, steady state']
    assert of['ddim10:learned:0.8: L1 at most 0.6 of a static plan that costs no less']
    failed = [claim for claim, holds in of.items() if holds is False]
    assert [claim.partition(':')[2][:12] for claim in failed] == ['learned:0.95', 'learned:0.95']
    assert of['ddim10:learned: success falls as sparsity rises, within the intervals'] is None
    rising = [row(f'ddim10:learned:{s}', set(range(n)), 2.0) for s, n in ((0.6, 20), (0.7, 60))]
    of = verdicts([*rows, *rising])
    assert of['ddim10:learned: success falls as sparsity rises, within the intervals'] is False


def test_a_static_plan_that_costs_less_is_no_match_for_the_learned_one() -> None:
    claim = 'ddpm100:learned:0.95: L1 at most 0.6 of a static plan that costs no less'
    learned = row('ddpm100:learned:0.95', set(), 5.5, 0.03)
    cheap, near = (
        row(f'ddpm100:static:{s}', set(), *of) for s, *of in ((0.95, 5, 0.1), (0.94, 6, 0.06))
    )
    dear = row('ddpm100:static:0.9', set(), 10, 0.01)
    assert verdicts([learned, cheap])[claim] is False
    assert verdicts([learned, cheap, near, dear])[claim] is True
    assert verdicts([learned, cheap, dear])[claim] is False
    assert verdicts([learned])[claim] is None


def test_rows_do_not_depend_on_the_order_of_measurement() -> None:
    names = ['ddim7', 'ddim2', 'ddpm100']
    done = {
        (task, name, seed): record
        for task in ('lift', 'can')
        for name in names
        for seed, record in episodes({0}, 2.0, 2).items()
    }
    rows = [(row['task'], row['variant']) for row in collect_rows(done)]
    assert rows == [(t, n) for t in ('can', 'lift') for n in ('ddpm100', 'ddim2', 'ddim7')]


def log_of(name: str, runs: dict[int, dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    return {('lift', name, seed): record for seed, record in runs.items()}


def test_rows_taken_over_are_compared_as_if_they_had_been_measured_here() -> None:
    dense, sparse = episodes(set(range(98)), 100.0), episodes(set(range(3, 100)), 2.0, 100)
    both = log_of('ddpm100', dense) | log_of('ddim10:learned:0.8', sparse)
    expected = collect_rows(both)
    assert expected[1]['paired']['won'] == 2 and expected[1]['paired']['lost'] == 3
    for kept, measured in (('ddpm100', 'ddim10:learned:0.8'), ('ddim10:learned:0.8', 'ddpm100')):
        earlier = [json.loads(json.dumps(r)) for r in expected if r['variant'] == kept]
        runs = {key: record for key, record in both.items() if key[1] == measured}
        assert collect_rows(runs, earlier) == expected


def test_an_earlier_row_stands_until_its_seeds_or_more_are_measured() -> None:
    earlier = [row('ddim10', set(range(90)), 10.0)]

    def successes(seeds: Iterable[int]) -> int:
        runs = {seed: episode(False, [10.0, 2.0], [1.0, 0.2]) for seed in seeds}
        return collect_rows(log_of('ddim10', runs), earlier)[0]['successes']

    assert successes(range(99)) == successes(range(50, 150)) == 90
    assert successes(range(100)) == successes(range(50, 151)) == 0


@given(st.sets(st.integers(0, 40)))
def test_the_seeds_of_a_row_are_those_it_was_measured_on(seeds: set[int]) -> None:
    runs = {seed: episode(True, [10.0, 2.0], [1.0, 0.2]) for seed in seeds | {7}}
    assert row_seeds(make_row('lift', Variant.parse('ddim10'), runs, None)) == seeds | {7}


def test_every_variant_is_in_every_file(tmp_path: Path) -> None:
    rows = [
        row('ddpm100', set(range(98)), 100.0),
        row('ddim10:learned:0.8', set(range(97)), 2.0, 0.03),
        row('ddim10:learned:0.8+execute2', set(), 2.0),
    ]
    as_json, as_csv = write_rows(rows, tmp_path)
    assert json.loads(as_json.read_text()) == rows
    with as_csv.open() as handle:
        assert [line['variant'] for line in csv.DictReader(handle)] == [r['variant'] for r in rows]
    write_page(rows, tmp_path / 'results.md')
    page = (tmp_path / 'results.md').read_text()
    for made in rows:
        assert f'| {made["variant"]} | {made["successes"]}/{made["episodes"]} |' in page
    write_plot(rows, tmp_path / 'pareto.png')
    assert (tmp_path / 'pareto.png').read_bytes()[1:4] == b'PNG'


def test_rows_of_variants_with_options_alone_are_drawn_too(tmp_path: Path) -> None:
    write_plot([row('ddim10+execute4', {1, 2}, 10.0)], tmp_path / 'pareto.png')
    assert (tmp_path / 'pareto.png').stat().st_size > 1000
