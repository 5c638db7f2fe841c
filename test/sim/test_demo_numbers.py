# SPDX-License-Identifier: Apache-2.0
"""What the demo makes of its records: variants, sums, table, colours, and the domain it picks."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')

from tts_policy.policy.contract import ActionSpec, CameraSpec, ObservationSpec, PolicyContract
from tts_policy.sim.demo import processes
from tts_policy.sim.demo.driver import EpisodeRecord
from tts_policy.sim.demo.processes import DemoError
from tts_policy.sim.demo.variants import (
    DemoBundle,
    Sampler,
    Variant,
    choose_variants,
    deadline_lines,
    read_bundle,
    summarise,
    table,
)

JOINTS = ('shoulder', 'finger')
DDIM = Sampler('ddim10', 'DDIM-10', 10, 0.8)
DDPM = Sampler('ddpm100', 'DDPM-100', 100, 0.95)
SPARSE = Variant('sparse', DDIM, 0.8, 2)


@pytest.fixture
def bundle(tmp_path: Path) -> DemoBundle:
    """Facts of a bundle with two samplers."""
    contract = PolicyContract(
        ObservationSpec((CameraSpec('camera', 24, 32),), JOINTS, 2, 0.05),
        ActionSpec(JOINTS, 16, 8, 1),
    )
    return DemoBundle(tmp_path, contract, {'ddim10': DDIM, 'ddpm100': DDPM})


def tick(latency_s: float, flops: int, **more: Any) -> dict[str, Any]:
    """Report of one tick of which all dense FLOPs are 100."""
    return {
        'latency_s': latency_s,
        'flops': flops,
        'dense_flops': 100,
        'sparsity': 1 - flops / 100,
        'deadline_miss': False,
        'deadline_miss_wall': False,
        'skipped_ticks': 0,
        'refused': None,
        **more,
    }


def record(success: bool, *ticks: dict[str, Any]) -> EpisodeRecord:
    """Return an episode of seed 7."""
    report = {'seed': 7, 'success': success, 'reason': 'success', 'duration_s': 2.1}
    return EpisodeRecord(JOINTS, ticks=list(ticks), report=report)


def test_sums_tell_the_dense_first_tick_from_the_steady_ones(bundle: DemoBundle) -> None:
    records = [
        record(True, tick(0.1, 100), tick(0.02, 20), tick(0.04, 30)),
        record(False, tick(0.1, 100), tick(0.03, 10)),
    ]
    summary = summarise(SPARSE, records, bundle, realtime=False)
    assert (summary['episodes'], summary['successes'], summary['ticks']) == (2, 1, 5)
    assert summary['latency_ms']['p50'] == pytest.approx(40)
    assert summary['flops_ratio'] == pytest.approx(0.52)
    assert summary['flops_ratio_steady'] == pytest.approx(0.2)
    assert summary['sparsity'] == pytest.approx(0.8)
    assert summary['sparsity_all_ticks'] == pytest.approx(0.48)


def test_a_deadline_in_lockstep_is_missed_by_wall_time(bundle: DemoBundle) -> None:
    late = [record(True, tick(0.5, 100, deadline_miss_wall=True), tick(0.1, 20))]
    summary = summarise(SPARSE, late, bundle, realtime=False)
    assert (summary['deadline_misses'], summary['deadlines']) == (1, 2)
    text = deadline_lines([SPARSE], [summary], 0.4, realtime=False)
    assert 'a chunk every 400 ms, by wall time' in text
    assert 'sparse DDIM-10 at 80 %  1 of 2' in text


def test_on_the_real_clock_deadlines_pass_while_the_policy_is_busy(bundle: DemoBundle) -> None:
    busy = tick(1.7, 100, deadline_miss=True, skipped_ticks=3)
    prompt = [tick(0.1, 20) for _ in range(3)]
    records = [record(False, busy), record(True, *prompt), record(False)]
    summary = summarise(SPARSE, records, bundle, realtime=True)
    assert (summary['deadline_misses'], summary['deadlines']) == (5 + 2 + 5, 15)
    text = deadline_lines([SPARSE], [summary], 0.4, realtime=True)
    assert 'a chunk every 400 ms, on the real clock' in text
    assert 'sparse DDIM-10 at 80 %  12 of 15' in text


def test_a_table_shows_a_dash_where_there_was_no_tick(bundle: DemoBundle) -> None:
    summaries = [
        summarise(SPARSE, [record(True, tick(0.1, 100), tick(0.02, 20))], bundle, realtime=False),
        summarise(SPARSE, [record(False)], bundle, realtime=False),
    ]
    lines = table([SPARSE, SPARSE], summaries).splitlines()
    assert lines[3].split()[5:] == ['1/1', '2', '60', '96', '80.0', '20.0', '60.0', '0', '0/2']
    assert lines[4].split()[5:] == ['0/1', '0', '–', '–', '–', '–', '–', '–', '0/0']
    assert len({len(line) for line in lines[1:]}) == 1


def test_variants_follow_the_bundle(bundle: DemoBundle) -> None:
    variants = choose_variants(bundle, 'ddim10', None, 10, 3)
    assert [(a.key, a.sampler.name, a.sparsity, a.episodes) for a in variants] == [
        ('sparse', 'ddim10', 0.8, 10),
        ('dense', 'ddpm100', 0.0, 3),
        ('sparse_ddpm100', 'ddpm100', 0.95, 1),
    ]
    assert [a.key for a in choose_variants(bundle, 'ddpm100', 0.9, 1, 1)] == ['sparse', 'dense']
    assert bundle.deadline_s == pytest.approx(0.4)


@pytest.mark.parametrize(
    ('arguments', 'reason'),
    [
        (('ddim7', None, 1, 1), r"sampler: expected one of \['ddim10', 'ddpm100'\], got 'ddim7'"),
        (('ddim10', 0.95, 1, 1), r'at most 0.9 \(1 - 1/10 steps\).* got 0.95'),
        (('ddim10', 0.0, 1, 1), 'sparsity: expected above 0'),
        (('ddim10', None, 1, 0), 'expected at least 1, got 1, 0'),
    ],
)
def test_impossible_variants_are_refused_by_name(
    bundle: DemoBundle, arguments: tuple[Any, ...], reason: str
) -> None:
    with pytest.raises(DemoError, match=reason):
        choose_variants(bundle, *arguments)


@pytest.mark.parametrize('text', ['[1, 2', 'samplers: 3', 'samplers: {a: {}}'])
def test_a_malformed_model_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / 'model.yaml').write_text(text)
    with pytest.raises(DemoError, match=r'model\.yaml: \w+: '):
        read_bundle(tmp_path)


def test_a_domain_in_use_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    free = processes.private_domain()
    monkeypatch.setattr(processes, 'DOMAINS', [free])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(('', 7400 + 250 * free + 10))
        with pytest.raises(DemoError, match='ROS domain: expected a free one'):
            processes.private_domain()


def test_the_axes_of_a_plan_name_the_blocks_that_the_denoiser_declares() -> None:
    pytest.importorskip('torch', reason='torch is not installed')
    from tts_policy.node.monitor import blocks_report
    from tts_policy.policy.denoisers.dit import DiTSpec
    from tts_policy.sim.demo.pictures import PlanColumns

    spec = DiTSpec(2, 4, 1, 3, width=16, layers=2, heads=2)
    columns = PlanColumns.of({'blocks': blocks_report(spec.stack)})
    assert columns.symbols == ('SA', 'FF', 'SA', 'FF')
    assert columns.legend == 'SA self-attention, FF feed-forward'
    assert columns.centres == {0: 0.5, 1: 2.5}
    assert [columns.begins_layer(column) for column in range(1, 4)] == [False, True, False]
