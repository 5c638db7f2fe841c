# SPDX-License-Identifier: Apache-2.0
"""evaluate_policy from the command line to its files, and the episodes that it is made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip('robosuite', reason='robosuite is not installed')

from tts_policy.evaluate import evaluate_policy
from tts_policy.evaluate.variants import Variant
from tts_policy.evaluate.worker import Job, Worker
from tts_policy.policy.bundle import load_bundle
from tts_policy.policy.policy import TestTimeSparsePolicy
from tts_policy.sim.episode import Timeline
from tts_policy.sim.panda import FRAME_NS
from tts_policy.sim.rollout import DeceivedRobot, run_episode
from tts_policy.sim.tasks.lift import LiftWorld


class CountingRobot:
    """A world that counts its pictures."""

    def __init__(self, world: LiftWorld, drawn: list[float]) -> None:
        self.reset, self.step, self.success = world.reset, world.step, world.success
        self.joint_positions, self._world, self._drawn = world.joint_positions, world, drawn

    def render(self) -> np.ndarray:
        self._drawn.append(self._world.data.time)
        return self._world.render()


def test_an_episode_depends_on_its_seed_alone(world: Any, bundle: Path) -> None:
    policy = TestTimeSparsePolicy.from_bundle(bundle, 'ddim10', threads=1)
    timeline = Timeline(8 * FRAME_NS, 20 * FRAME_NS)
    first = run_episode(policy, world, 5, 0.8, timeline)
    run_episode(policy, world, 6, 0.8, timeline)
    again = run_episode(policy, world, 5, 0.8, timeline)
    # Ticks at frames 1, 9 and 17; the first is dense.
    assert [round(c.stats.sparsity, 6) for c in first.chunks] == [0.0, 0.8, 0.8]
    for a, b in zip(first.chunks, again.chunks, strict=True):
        assert np.array_equal(a.actions, b.actions) and np.array_equal(a.plan, b.plan)


def test_the_deceived_camera_shows_the_same_arm_and_another_cube(world: Any) -> None:
    shown = LiftWorld()
    deceived = DeceivedRobot(world, shown)
    deceived.reset(3)
    assert deceived.joint_positions() == shown.joint_positions()
    assert np.abs(world.position(world.cube_qpos) - shown.position(shown.cube_qpos)).max() > 0.01
    difference = np.abs(deceived.render().astype(int) - world.render()).max(axis=-1)
    # Two cubes' worth of pixels differ, nothing else.
    assert 100 < (difference > 40).sum() < 1200
    shown.close()


def test_costs_are_counted_from_the_plans(worker: Worker) -> None:
    dense = worker.run(Job('lift', Variant.parse('ddim10'), 100_000))
    sparse = worker.run(Job('lift', Variant.parse('ddim10:learned:0.8+execute15'), 100_000))
    assert (dense['ticks'], sparse['ticks']) == (15, 8)
    assert set(dense['fe']) == {10.0} and sparse['fe'] == [10.0] + [2.0] * 7
    assert sparse['gflops'][0] == dense['gflops'][0] > 3 * sparse['gflops'][1]
    assert dense['mix']['compute'] == 1.0 and sparse['mix']['compute'] == pytest.approx(0.2)


@pytest.mark.parametrize('noise', ['', '+noiseless', '+fresh'])
def test_the_action_error_is_zero_where_nothing_is_reused(worker: Worker, noise: str) -> None:
    # The dense chunk that it is compared with has the same noise.
    error = worker.run(Job('lift', Variant.parse(f'ddim10:learned:0.001{noise}')))['l1_error']
    assert error == pytest.approx(0.0, abs=1e-6)


def test_other_plans_have_an_action_error_and_dense_variants_none(worker: Worker) -> None:
    assert worker.run(Job('lift', Variant.parse('ddim10:random:0.8')))['l1_error'] > 1e-4
    assert worker.run(Job('lift', Variant.parse('ddim10')))['l1_error'] is None


def test_a_variant_that_is_another_one_here_is_left_out(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = [
        Variant.parse(name) for name in ('ddim10', 'ddim10+held', 'ddim10+fresh', 'ddim10+free')
    ]
    able = evaluate_policy.runnable('lift', variants, load_bundle(bundle))
    assert [variant.name for variant in able] == ['ddim10', 'ddim10+fresh']
    assert 'left out ddim10+held: with this bundle it is ddim10' in capsys.readouterr().err


def test_variants_take_turns_at_every_tick_but_the_first(worker: Worker, bundle: Path) -> None:
    variants = [Variant.parse(name) for name in ('ddim2', 'ddim32', 'ddim10:static:0.8')]
    turns = list(worker.turns('lift', variants))
    assert len(turns) == worker.steady_ticks('lift') > 2
    assert all(list(turn) == [variant.name for variant in variants] for turn in turns)
    few, many, _ = (np.median([turn[variant.name] for turn in turns]) for variant in variants)
    assert 0 < few < many


def evaluate(bundle: Path, out: Path, arguments: str) -> int:
    """Exit status of the command, on one other episode of Lift."""
    options = f'--workers 1 --sequences 1 {arguments}'.split()
    return evaluate_policy.main([f'lift={bundle}', '--out', str(out), *options])


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped_and_tells_what_it_left_out(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = '--variants ddim2 ddim10:static:0.8 ddim16:learned:0.8'
    assert evaluate(bundle, tmp_path, f'--episodes 1 {variants}') == 0
    log = tmp_path / 'episodes.jsonl'
    before = log.read_text()
    assert len(before.splitlines()) == 3
    with log.open('a') as handle:
        handle.write('{"task": "lift", "va')
    assert 'left out ddim16:learned:0.8: expected a bundle with' in capsys.readouterr().err
    assert evaluate(bundle, tmp_path, '--variants ddim2 --episodes 2') == 0
    assert log.read_text().startswith(before) and len(log.read_text().splitlines()) == 5
    rows = json.loads((tmp_path / 'results.json').read_text())
    assert [row['variant'] for row in rows] == ['ddim2', 'ddim10:static:0.8']
    assert [row['episodes'] for row in rows] == [2, 1]
    assert rows[1]['fe_steady'] == 2.0
    assert (tmp_path / 'pareto.png').stat().st_size > 1000


@pytest.mark.parametrize(
    ('arguments', 'reason'),
    [
        ('--variants ddim10:guessed:0.8', 'plan: expected PLAN:SPARSITY'),
        ('--variants ddim10+execute16', 'execute: expected in [1, 15], got 16'),
        ('--episodes 0', 'expected at least 1, got (0, '),
        ('--latency -1', 'latency: expected at least 0 episodes, got -1'),
        ('--seed 99999', 'seeds: expected some in [100000, 900000)'),
        ('--seed 899999 --episodes 2', 'seeds: expected some in [100000, 900000)'),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(
    arguments: str,
    reason: str,
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert evaluate(bundle, tmp_path, arguments) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count('\n') == 1


@pytest.mark.slow
def test_rows_of_an_earlier_page_are_taken_over_and_not_measured_again(
    bundle: Path,
    grow: Callable[[Path, Path, float], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = tmp_path / 'first', tmp_path / 'second'
    assert evaluate(bundle, first, '--episodes 1 --variants ddim2 ddim3') == 0
    known = f'--episodes 1 --earlier {first}/results.json --variants ddim2'
    assert evaluate(bundle, second, f'{known} ddim4') == 0
    measured = [json.loads(r) for r in (second / 'episodes.jsonl').read_text().splitlines()]
    assert [record['variant'] for record in measured] == ['ddim4']
    rows = {row['variant']: row for row in json.loads((second / 'results.json').read_text())}
    assert list(rows) == ['ddim2', 'ddim3', 'ddim4']
    assert rows['ddim2'] == json.loads((first / 'results.json').read_text())[0]
    assert 'latency_in_turns' not in rows['ddim4'] and '| ~' in (second / 'results.md').read_text()
    assert evaluate(bundle, second, f'{known} --latency 1') == 0
    timed = {row['variant']: row for row in json.loads((second / 'results.json').read_text())}
    assert list(timed) == list(rows)
    assert len({json.dumps(row['latency_in_turns']) for row in timed.values()}) == 1
    assert timed['ddim2']['latency_in_turns']['ticks'] > 2
    page = (second / 'results.md').read_text()
    assert '| ~' not in page and 'ticks in turns on' in page
    other = grow(bundle, tmp_path / 'more', 0.6)
    assert evaluate(other, second, known) == 0
    assert 'of other bundles' not in capsys.readouterr().err


ROW = (
    '{"variant": "a", "digest": "d", "episodes": 1, "seed_runs": [], "failed_seeds": [], "task": '
)


@pytest.mark.parametrize(
    'text', ['', '{}', '[{"task": "lift", "variant": "ddim2"}]', '[1]', f'[{ROW}"juggle"}}]']
)
def test_earlier_results_that_say_too_little_are_refused_in_one_line(
    text: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = tmp_path / 'results.json'
    earlier.write_text(text)
    assert evaluate(bundle, tmp_path / 'out', f'--earlier {earlier}') == 2
    error = capsys.readouterr().err
    assert str(earlier) in error and error.count('\n') == 1


def test_an_evaluation_draws_the_frames_of_windows_and_sees_the_same(
    world: Any, bundle: Path
) -> None:
    policy = TestTimeSparsePolicy.from_bundle(bundle, 'ddim10', threads=1)
    timeline, drawn = Timeline(8 * FRAME_NS, 20 * FRAME_NS), []
    counted = CountingRobot(world, drawn)
    few = run_episode(policy, counted, 5, 0.8, timeline)
    assert len(drawn) == 6
    every = run_episode(policy, counted, 5, 0.8, timeline, keep_frames=True)
    assert len(drawn) == 6 + len(every.frames) == 26
    for a, b in zip(few.chunks, every.chunks, strict=True):
        assert np.array_equal(a.actions, b.actions)


def test_an_unknown_task_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as status:
        evaluate_policy.main(['juggle', '--out', str(tmp_path)])
    assert status.value.code == 2
    assert "task: expected one of ['can', 'lift', 'pusht', 'stack']" in capsys.readouterr().err
