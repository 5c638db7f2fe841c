# SPDX-License-Identifier: Apache-2.0
"""Faults of the policy and of its thread; as for the sensors, one node survives them all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')
pytest.importorskip('torch', reason='torch is not installed')

from cell import held, moving, reported
from processes import wait_until

if TYPE_CHECKING:
    from feeder import Feeder

pytestmark = pytest.mark.fault

NAMESPACE = '/policy_faults'


def test_a_short_stall_drops_points_and_goes_on(arm: Feeder) -> None:
    arm.inject('stall 0.2')
    late = wait_until(
        lambda: [t for t in arm.ticks if t['observation_age_s'] > 0.2 and not t['refused']],
        3,
        'a late chunk',
    )
    assert late[0]['dropped_points'] >= 4


def test_a_chunk_that_comes_too_late_is_not_sent_and_is_a_missed_deadline(arm: Feeder) -> None:
    arm.inject('stall 0.8')
    refused = wait_until(
        lambda: [tick['refused'] for tick in arm.ticks if tick['refused']], 3, 'a refused chunk'
    )
    assert 'set-points or more still to come' in refused[0]
    reported(arm, 'deadline missed')


def test_a_policy_that_is_always_late_drops_points_and_says_so(arm: Feeder) -> None:
    arm.inject('slow 0.25')
    reported(arm, 'deadline missed')
    moving(arm)
    wait_until(lambda: any(t['dropped_points'] >= 5 for t in arm.ticks), 3, 'dropped points')


@pytest.mark.parametrize('fault', ['stall 2.0', 'hang', 'publish'])
def test_a_hung_inference_deactivates_the_node_with_a_hold(arm: Feeder, fault: str) -> None:
    arm.inject(fault)
    reported(arm, 'inference failed: a ')
    assert arm.state() == 'inactive'
    held(arm)
    arm.silent()
    if fault != 'stall 2.0':
        assert not arm.change('activate')


def test_a_stall_that_is_over_leaves_no_error_behind_once_the_node_is_active_again(
    arm: Feeder,
) -> None:
    arm.inject('stall 2.0')
    reported(arm, 'inference failed: a tick has taken')
    wait_until(lambda: arm.change('activate'), 4, 'an activate')
    moving(arm)
    wait_until(lambda: arm.status and arm.status.level == b'\x00', 4, 'an OK in diagnostics')


def test_a_policy_that_raises_deactivates_the_node_with_a_hold(arm: Feeder) -> None:
    arm.inject('raise')
    reported(arm, 'inference failed: RuntimeError: out of memory')
    assert arm.state() == 'inactive'
    held(arm)
    arm.silent()


@pytest.mark.parametrize(
    ('fault', 'reason'),
    [
        ('nan', 'expected finite set-points, got nan'),
        ('inf', 'expected finite set-points, got inf'),
        ('outside', 'shoulder: expected position [-0.9, 0.9]'),
        ('fast', 'elbow: expected velocity at most 1.0'),
        ('zigzag', 'expected acceleration at most 10.0'),
        ('jump', 'shoulder: expected'),
        ('columns', 'chunk: expected [usable, 3] set-points'),
        ('empty', 'chunk: expected [usable, 3] set-points'),
    ],
)
def test_a_bad_chunk_is_dropped_whole_and_counted(arm: Feeder, fault: str, reason: str) -> None:
    arm.inject(fault)
    reported(arm, reason)
    arm.silent()
    assert int(arm.values()['refused_chunks']) > 0
    # What it left in the feature cache is forgotten.
    wait_until(lambda: any(t['reset'] == 'chunk refused' for t in arm.ticks), 3, 'a new episode')
