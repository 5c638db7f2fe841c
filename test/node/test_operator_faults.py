# SPDX-License-Identifier: Apache-2.0
"""What operators do to a running node: parameters, stops, transitions, robot descriptions.

One node survives them all.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')
pytest.importorskip('torch', reason='torch is not installed')

from cell import held, moving, reported
from processes import wait_until
from spoilers import set_field

if TYPE_CHECKING:
    from feeder import Feeder

pytestmark = pytest.mark.fault

NAMESPACE = '/operator_faults'


def test_a_storm_of_parameters_neither_stops_the_arm_nor_tears_a_tick(arm: Feeder) -> None:
    arm.forget()
    pairs = [{'sparsity': 0.3 + 0.5 * (n % 2), 'n_execute': 3 + n % 2} for n in range(1000)]
    assert arm.set_all(pairs) == 1000
    assert {tick['requested_sparsity'] for tick in arm.ticks} <= {0.3, 0.8}
    moving(arm)
    assert arm.set(sparsity=0.8, n_execute=4) == ''


def test_a_gate_that_is_switched_quickly_holds_each_time(arm: Feeder) -> None:
    for _ in range(5):
        assert arm.set(enable_output=False) == ''
        held(arm)
        count = len(arm.commands)
        assert arm.set(enable_output=True) == ''
        wait_until(lambda n=count: len(arm.commands) > n, 3, 'commands')


def test_a_glitch_of_the_joints_and_then_a_stop_holds_the_set_point_in_force(arm: Feeder) -> None:
    arm.spoil_joints = set_field(position=[0.1, 9.0, 0.2, 2.8])
    time.sleep(0.1)
    assert arm.set(enable_output=False) == ''
    held(arm)
    assert arm.commands[-1].points[0].positions[0] == pytest.approx(0.3, abs=0.05)
    assert arm.set(enable_output=True) == ''


def test_an_emergency_stop_closes_the_gate_until_the_service(arm: Feeder) -> None:
    arm.emergency_stop(True)
    held(arm)
    arm.silent()
    reported(arm, 'output closed: emergency stop')
    assert arm.set(enable_output=False) == arm.set(enable_output=True) == ''
    refused = arm.clear_stop()
    assert not refused.success and 'still true' in refused.message
    arm.emergency_stop(False)
    arm.silent()
    wait_until(lambda: arm.proposals, 3, 'a dry run meanwhile')
    assert arm.clear_stop().success


def test_a_stop_outlasts_deactivate_and_cleanup(arm: Feeder) -> None:
    arm.emergency_stop(True)
    held(arm)
    for transition in ('deactivate', 'cleanup', 'configure'):
        assert arm.change(transition)
    wait_until(lambda: arm.matched, 5, 'subscriptions')
    assert arm.change('activate')
    arm.silent()
    arm.emergency_stop(False)
    wait_until(lambda: arm.clear_stop().success, 2, 'an opened gate')


def test_a_transition_that_is_not_possible_does_not_end_the_node(arm: Feeder) -> None:
    arm.ask('cleanup')
    arm.ask('configure')
    moving(arm)
    assert arm.state() == 'active'


def test_a_reset_in_motion_is_one_dense_tick(arm: Feeder) -> None:
    assert arm.reset().success
    wait_until(lambda: any(tick['reset'] == 'service' for tick in arm.ticks), 2, 'reset')
    moving(arm)


TIGHT = """<robot name="r"><joint name="shoulder" type="revolute">
<limit lower="-2" upper="2" velocity="0.01" effort="1"/></joint></robot>"""
WIDE = TIGHT.replace('0.01', '3')


def test_a_robot_description_with_entities_stops_the_arm_until_a_sound_one_comes(
    arm: Feeder,
) -> None:
    arm.describe_robot(f'<!DOCTYPE robot [<!ENTITY a "b">]>{WIDE}')
    reported(arm, 'expected no document type declaration')
    arm.silent()
    arm.describe_robot(WIDE)


def test_a_robot_description_tightens_the_limits(arm: Feeder) -> None:
    arm.describe_robot(TIGHT)
    reported(arm, 'shoulder: expected velocity at most 0.01')
    arm.silent()
    arm.describe_robot(WIDE)
