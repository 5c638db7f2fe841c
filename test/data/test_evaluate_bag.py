# SPDX-License-Identifier: Apache-2.0
"""evaluate_bag as a command: its numbers, its report, how it goes on, what it says of damage."""

from __future__ import annotations

import csv
import json
import re
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest
from recordings import (
    MS,
    STORE,
    TYPES,
    Recording,
    add_file,
    compressed_image,
    make_chunk_bomb,
    storage_file,
)
from rosbags.typesys import get_types_from_msg

from tts_policy.data import evaluate_bag
from tts_policy.data.bag_evaluation import EvaluationSpec
from tts_policy.data.bag_samples import SampleReader, Topics
from tts_policy.data.evaluate_bag import bag_folder
from tts_policy.data.reader import BagReader
from tts_policy.data.replay import RecordedTicks
from tts_policy.data.summary import knee, segments
from tts_policy.policy.bundle import save_random_bundle
from tts_policy.policy.network import NetworkSpec
from tts_policy.policy.policy import TestTimeSparsePolicy
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.policy.schedulers.scheduler import SchedulerSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from tts_policy.policy.contract import PolicyContract

SPARSITIES = ['0', '0.5', '0.8']


@pytest.fixture
def evaluate(tmp_path: Path, small_bundle: Path) -> Callable[..., tuple[int, Path]]:
    """Run the command on bags; returns its status and its folder."""

    def run(*bags: Path, out: str = 'out', extra: tuple[str, ...] = ()) -> tuple[int, Path]:
        arguments = [*map(str, bags), '--bundle', str(small_bundle), '--out', str(tmp_path / out)]
        status = evaluate_bag.main([*arguments, '--sparsity', *SPARSITIES, *extra])
        return status, tmp_path / out

    return run


def arrays(out: Path, bag: Path, name: str) -> np.ndarray:
    """A column over all ticks of a bag."""
    parts = []
    for path in segments(bag_folder(out, bag)):
        with np.load(path) as data:
            parts.append(data[name])
    return np.concatenate(parts)


def test_the_report_has_every_tick_and_no_error_at_sparsity_zero(
    tmp_path: Path, evaluate: Callable[..., tuple[int, Path]]
) -> None:
    bag = Recording(gaps_after=(20,)).write(tmp_path / 'bag')
    status, out = evaluate(bag)
    assert status == 0
    report = json.loads((out / 'report.json').read_text())
    assert report['ticks'] == 6 and report['steady_ticks'] == 4 and report['problems'] == []
    assert list(report['sparsity']) == ['0.0', '0.5', '0.8']
    dense, _, sparse = report['sparsity'].values()
    assert dense['l1_mean_rad'] == dense['l1_p95_rad'] == dense['max_rad'] == 0.0
    assert dense['flops_ratio'] == 1.0
    assert sparse['l1_mean_rad'] > 0 and sparse['realised_sparsity'] == pytest.approx(0.8)
    assert sparse['flops_ratio'] < 0.3
    with (out / 'ticks.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * 3
    rows = [row for row in rows if row['requested_sparsity'] == '0.8']
    steady = [float(row['l1_rad']) for row in rows if row['first_of_episode'] == '0']
    assert np.mean(steady) == pytest.approx(sparse['l1_mean_rad'])


def test_chunks_are_those_of_the_policy_seeded_by_the_episode(
    tmp_path: Path, small_bundle: Path, evaluate: Callable[..., tuple[int, Path]]
) -> None:
    bag = Recording(gaps_after=(20,)).write(tmp_path / 'bag')
    _, out = evaluate(bag, extra=('--seed', '3'))
    policy = TestTimeSparsePolicy.from_bundle(small_bundle, 'ddim10')
    got = arrays(out, bag, 'actions')
    topics = Topics.of(policy.contract)
    samples = SampleReader(BagReader(bag), policy.contract, topics)
    at = 0
    for tick in RecordedTicks(samples, 8 * 50 * MS):
        if tick.scheduled.reset:
            policy.reset(3 + tick.scheduled.episode)
        np.testing.assert_array_equal(
            got[at, 3], policy.act(tick.scheduled.observation, 0.8).actions
        )
        at += 1
    assert at == len(got) == 6


def test_a_policy_without_cameras_is_evaluated_without_pictures(
    tmp_path: Path, small_contract: PolicyContract
) -> None:
    bundle, bag, out = tmp_path / 'bundle', tmp_path / 'bag', tmp_path / 'out'
    blind = replace(small_contract, observation=replace(small_contract.observation, cameras=()))
    samplers = {'ddim10': SamplerSpec(SchedulerSpec('ddim', 10))}
    save_random_bundle(bundle, blind, samplers, NetworkSpec(width=32, layers=2, heads=2), seed=0)
    Recording().write(bag)
    arguments = [str(bag), '--bundle', str(bundle), '--out', str(out), '--sparsity', '0.5']
    assert evaluate_bag.main(arguments) == 0
    assert len(arrays(out, bag, 'stamp_ns')) > 3
    assert 'changed most' not in (out / 'report.html').read_text()


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_bits(
    tmp_path: Path, evaluate: Callable[..., tuple[int, Path]]
) -> None:
    pytest.importorskip('ray', reason='ray is not installed')
    bag = Recording(gaps_after=(20,)).write(tmp_path / 'bag')
    _, one = evaluate(bag, out='one')
    status, two = evaluate(bag, out='two', extra=('--engine', 'ray', '--processes', '2'))
    assert status == 0
    for name in ('stamp_ns', 'actions', 'plan'):
        np.testing.assert_array_equal(arrays(one, bag, name), arrays(two, bag, name))


@pytest.mark.slow
def test_processes_share_a_bag_by_episodes_without_changing_a_bit(
    tmp_path: Path, evaluate: Callable[..., tuple[int, Path]]
) -> None:
    bag = Recording(gaps_after=(10, 20, 30)).write(tmp_path / 'bag')
    _, one = evaluate(bag, out='one')
    status, two = evaluate(bag, out='two', extra=('--processes', '2'))
    assert status == 0
    for name in ('stamp_ns', 'actions', 'plan', 'future'):
        np.testing.assert_array_equal(arrays(one, bag, name), arrays(two, bag, name))


def test_an_interrupted_evaluation_goes_on_where_it_was(
    tmp_path: Path,
    evaluate: Callable[..., tuple[int, Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bag = Recording(gaps_after=(10, 20, 30)).write(tmp_path / 'bag')
    _, whole = evaluate(bag, out='whole')
    acts = 0
    act = TestTimeSparsePolicy.act

    def interrupted(*args, **kwargs):
        nonlocal acts
        acts += 1
        if acts == 4 * 3 + 2:
            raise KeyboardInterrupt
        return act(*args, **kwargs)

    monkeypatch.setattr(TestTimeSparsePolicy, 'act', interrupted)
    status, out = evaluate(bag)
    assert status == 130
    done = len(segments(bag_folder(out, bag)))
    assert done >= 1
    status, out = evaluate(bag)
    assert status == 0
    ticks = len(arrays(whole, bag, 'stamp_ns'))
    assert acts < 4 * 3 + 2 + 4 * ticks, 'complete episodes are not computed again'
    np.testing.assert_array_equal(arrays(whole, bag, 'actions'), arrays(out, bag, 'actions'))
    before = acts
    assert evaluate(bag)[0] == 0 and acts == before


def test_a_bag_recorded_anew_at_the_same_place_is_evaluated_anew(
    tmp_path: Path, evaluate: Callable[..., tuple[int, Path]]
) -> None:
    bag = Recording(frames=12).write(tmp_path / 'bag')
    _, out = evaluate(bag)
    before = json.loads((out / 'report.json').read_text())
    bag.rename(tmp_path / 'old')
    assert Recording(frames=40).write(tmp_path / 'bag') == bag
    status, out = evaluate(bag)
    after = json.loads((out / 'report.json').read_text())
    assert status == 0 and after['bags'] == before['bags']
    assert len(arrays(out, bag, 'stamp_ns')) == after['ticks'] > before['ticks']


def test_a_folder_of_other_settings_is_not_mixed_into(
    tmp_path: Path,
    evaluate: Callable[..., tuple[int, Path]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    bag = Recording(frames=12).write(tmp_path / 'bag')
    assert evaluate(bag)[0] == 0
    assert evaluate(bag, extra=('--seed', '1'))[0] == 2
    assert 'with the same seed, got another: choose another --out' in capsys.readouterr().err


def test_a_sparsity_above_the_limit_of_the_sampler_is_left_out_and_said(
    tmp_path: Path,
    evaluate: Callable[..., tuple[int, Path]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    bag = Recording(frames=12).write(tmp_path / 'bag')
    status, out = evaluate(bag, extra=('--sparsity', '0', '0.9', '0.95'))
    assert status == 0
    assert 'ddim10 takes at most 0.9: [0.95] left out' in capsys.readouterr().err
    report = json.loads((out / 'report.json').read_text())
    assert list(report['sparsity']) == ['0.0', '0.9'] and report['left_out'] == [0.95]
    page = (out / 'report.html').read_text()
    assert '0.95 left out: above what the sampler ddim10 can do.' in page


def test_a_sparsity_that_the_pruner_was_not_trained_for_is_served_by_the_nearest_and_said(
    tmp_path: Path, evaluate: Callable[..., tuple[int, Path]]
) -> None:
    bag = Recording(frames=12).write(tmp_path / 'bag')
    _, out = evaluate(bag, extra=('--sparsity', '0', '0.5', '0.8'))
    rows = json.loads((out / 'report.json').read_text())['sparsity']
    assert [row['trained_for'] for row in rows.values()] == [None, 0.8, 0.8]
    page = (out / 'report.html').read_text()
    assert 'The pruner was not trained for 0.5: the nearest table serves.' in page


def cut_off(path: Path) -> None:
    file = storage_file(Recording().write(path))
    file.write_bytes(file.read_bytes()[:-1000])


def without_its_second_file(path: Path) -> None:
    add_file(Recording().write(path), Recording().write(path.with_name('other')))
    (path / 'second.mcap').unlink()


def of_another_type(path: Path) -> None:
    """Joint states of a type that only their sender knows."""
    STORE.register(get_types_from_msg('float64 angle', 'own_msgs/msg/Angle'))
    angle = TYPES['own_msgs/msg/Angle']
    messages = [m for m in Recording().messages() if m[0] != '/joint_states']
    messages += [('/joint_states', stamp, angle(0.5)) for _, stamp, _ in messages]
    Recording().write(path, messages)


def of_another_topic(path: Path) -> None:
    Recording(image_topic='/other').write(path)


def without_images(path: Path) -> None:
    Recording().write(path, [m for m in Recording().messages() if 'image' not in m[0]])


def no_bag_but_a_database(path: Path) -> None:
    Recording(storage='sqlite3').write(path)
    storage_file(path).unlink()
    with sqlite3.connect(path / f'{path.name}.db3') as database:
        database.execute('CREATE TABLE numbers (name TEXT)')


def with_a_chunk_that_expands(path: Path) -> None:
    make_chunk_bomb(Recording(compression='storage').write(path))


def with_images_that_expand(path: Path) -> None:
    _, huge = cv2.imencode('.png', np.zeros((8000, 8000, 3), np.uint8))
    messages = list(Recording().messages())
    for at, (topic, stamp, _) in enumerate(messages):
        if topic == '/camera/image':
            messages[at] = (topic, stamp, compressed_image(stamp, 'png', huge.ravel()))
    Recording().write(path, messages[:40])


@pytest.mark.fault
@pytest.mark.parametrize(
    ('spoil', 'ticks', 'reason'),
    [
        (cut_off, 0, 'expected an mcap file with its summary at the end, got one cut off'),
        (without_its_second_file, 5, "expected file 'second.mcap', got none"),
        (of_another_type, 0, 'JointState, got own_msgs/msg/Angle'),
        (
            lambda path: Recording(image_topic='/other').write(path),
            0,
            "expected topics ['/camera/image']",
        ),
        (without_images, 0, "expected topics ['/camera/image'], got"),
        (lambda path: Recording(back_after=20).write(path), 3, 'expected stamps that go forward'),
        (lambda path: Recording(frames=0).write(path), 0, "expected topics ['/camera/image']"),
        (lambda path: Recording(frames=1).write(path), 0, 'expected ticks, got none: '),
        (no_bag_but_a_database, 0, 'missing tables'),
        (with_a_chunk_that_expands, 0, 'bytes of it, got more'),
        (with_images_that_expand, 0, 'of 24 x 32 (height x width), got 8000 x 8000'),
    ],
)
def test_damage_is_one_line_and_what_could_be_read_is_reported(
    tmp_path: Path,
    evaluate: Callable[..., tuple[int, Path]],
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], object],
    ticks: int,
    reason: str,
) -> None:
    good, bad = Recording().write(tmp_path / 'good'), tmp_path / 'bad'
    spoil(bad)
    status, out = evaluate(good, bad)
    assert status == 1
    report = json.loads((out / 'report.json').read_text())
    assert report['ticks'] == 5 + ticks
    errors = capsys.readouterr().err
    assert 'Traceback' not in errors
    lines = [line for line in report['problems'] if reason in line]
    assert len(lines) == 1 and str(bad) in lines[0] and '\n' not in lines[0]
    assert lines[0] in errors and str(good) not in str(report['problems'])
    alone = evaluate(bad, out='alone')[0]
    assert alone == (1 if ticks else 2) and reason in capsys.readouterr().err


@pytest.mark.fault
@pytest.mark.parametrize(
    ('extra', 'reason'),
    [
        (('--sparsity', '0.95'), 'sparsity: expected a number in [0, 0.9]'),
        (('--sparsity', '-0.1', '0.5'), 'sparsity: expected a number in [0, 0.9]'),
        (('--sampler', 'euler'), 'sampler: expected one of'),
        (('--topic', 'camera'), '--topic: expected STREAM:=TOPIC'),
        (('--topic', 'wrist:=/x'), "got ['wrist']"),
        (('--processes', '0'), 'expected processes from 1 on'),
        (('--n-execute', '99'), 'n_execute up to 15'),
        (('--threads', '0'), 'threads: expected at least 1, got 0'),
        (('--engine', 'ray'), 'expected the package ray'),
    ],
)
def test_arguments_that_cannot_work_end_with_2(
    tmp_path: Path,
    evaluate: Callable[..., tuple[int, Path]],
    capsys: pytest.CaptureFixture[str],
    extra: tuple[str, ...],
    reason: str,
) -> None:
    if 'ray' in extra:
        try:
            import ray  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip('ray is installed')
    bag = Recording(frames=4).write(tmp_path / 'bag')
    assert evaluate(bag, extra=extra)[0] == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]


def test_the_page_needs_nothing_else_and_escapes_what_bags_say(
    tmp_path: Path, evaluate: Callable[..., tuple[int, Path]]
) -> None:
    name = '<img src=x onerror=alert(1)>'
    bag = Recording().write(tmp_path / name)
    other = Recording(image_topic='/<b>&').write(tmp_path / 'other')
    status, out = evaluate(bag, other)
    assert status == 1
    page = (out / 'report.html').read_text()
    assert '<img src=x' not in page and '/<b>' not in page
    assert '&lt;img src=x onerror=alert(1)&gt;' in page and '/&lt;b&gt;&amp;' in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert '<script' not in page and page.count('data:image/png;base64,') >= 5


def test_the_knee_is_the_highest_sparsity_under_the_tolerance() -> None:
    assert knee([0.0, 0.5, 0.8], [0.0, 0.01, 0.03], 0.02) == 0.5
    assert knee([0.5, 0.8], [0.01, 0.015], 0.02) == 0.8
    assert knee([0.5, 0.8], [0.1, 0.2], 0.02) is None


def test_settings_that_change_the_result_are_told_apart(small_bundle: Path) -> None:
    spec = EvaluationSpec(small_bundle, 'ddim10', (0.5,))
    for change in ({'seed': 1}, {'sparsities': (0.6,)}, {'sampler': 'ddpm100'}, {'n_execute': 4}):
        assert replace(spec, **change).to_dict() != spec.to_dict()
    assert replace(spec, threads=2).to_dict() == spec.to_dict()
