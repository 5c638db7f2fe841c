# SPDX-License-Identifier: Apache-2.0
"""Declared parameters: every one has a value from the start, and YAML's traps are named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')

import rclpy
from rclpy.parameter import Parameter

from tts_policy.node import parameters
from tts_policy.node.parameter_table import PARAMETERS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rclpy.node import Node

    from tts_policy.policy.contract import PolicyContract


@pytest.fixture
def node(ros: None) -> Iterator[Node]:
    node = rclpy.create_node('declared')
    yield node
    node.destroy_node()


def test_every_parameter_has_a_value_of_its_type_so_that_all_can_be_asked_for(node: Node) -> None:
    """The parameter service answers nothing at all when one of those asked for is unset."""
    parameters.declare(node)
    types = {spec.name: node.get_parameter(spec.name).type_ for spec in PARAMETERS}
    assert types == {spec.name: spec.type for spec in PARAMETERS}
    settings = parameters.read(node)
    parameters.check(settings)
    assert not parameters.joint_limits(settings, ['shoulder']).lower.max() > float('-inf')


def settings(**changes: Any) -> parameters.Settings:
    defaults = {spec.name: spec.default for spec in PARAMETERS}
    return parameters.Settings(defaults | {k.replace('__', '.'): v for k, v in changes.items()})


@pytest.mark.fault
@pytest.mark.parametrize('names', [None, ['finger', 'shoulder']])
def test_the_way_to_the_first_point_is_bounded_where_nobody_set_a_bound(
    names: list[str] | None,
) -> None:
    joints = ['shoulder', 'finger']
    got = parameters.joint_limits(settings(limits__joints=names), joints)
    assert got.first_distance.tolist() == [0.5, 0.5]
    got = parameters.joint_limits(
        settings(limits__joints=names, limits__first_point_default=0.2), joints
    )
    assert got.first_distance.tolist() == [0.2, 0.2]


def test_a_bound_of_the_first_point_that_was_set_is_the_one_in_force() -> None:
    given = settings(limits__joints=['finger', 'shoulder'], limits__first_point=[0.05, 3.0])
    got = parameters.joint_limits(given, ['shoulder', 'finger'])
    assert got.first_distance.tolist() == [3.0, 0.05]


@pytest.mark.fault
def test_the_way_to_the_first_point_cannot_be_unbounded() -> None:
    given = settings(limits__joints=['finger', 'shoulder'], limits__first_point=[0.05, np.inf])
    with pytest.raises(parameters.ParameterError, match=r'limits.first_point: expected finite'):
        parameters.joint_limits(given, ['shoulder', 'finger'])


def test_the_tolerance_counts_for_the_limits_of_a_robot_description_alone() -> None:
    got = parameters.joint_limits(settings(limits__tolerance=0.1), ['shoulder'])
    assert got.tolerance == 0.1


@pytest.mark.fault
def test_a_gripper_that_the_bundle_does_not_have_cannot_hold_its_last_command(
    small_contract: PolicyContract,
) -> None:
    joints = small_contract.action.joints
    rule = parameters.hold_rule(settings(hold_last_command=['finger']), joints)
    assert rule.last_command == ['finger']
    with pytest.raises(parameters.ParameterError, match=r"hold_last_command: .* got \['fingr'\]"):
        parameters.hold_rule(settings(hold_last_command=['finger', 'fingr']), joints)


@pytest.mark.fault
def test_more_points_than_a_chunk_has_are_refused(small_contract: PolicyContract) -> None:
    assert parameters.chunk_timing(settings(min_points=15), small_contract).min_points == 15
    with pytest.raises(parameters.ParameterError, match='min_points: expected at most the 15'):
        parameters.chunk_timing(settings(min_points=16), small_contract)


@pytest.mark.fault
def test_a_latency_that_never_leaves_enough_points_is_refused(
    small_contract: PolicyContract,
) -> None:
    """The interval fits: every chunk would be a missed deadline all the same."""
    period_s = small_contract.observation.period_s
    few = settings(n_execute=1, min_points=2, lead_time_s=0.01)
    parameters.check_latency(small_contract, few, 3.5 * period_s)
    many = settings(n_execute=1, min_points=13, lead_time_s=0.01)
    with pytest.raises(parameters.ParameterError, match=r'min_points: expected 13 .*, got 12'):
        parameters.check_latency(small_contract, many, 3.5 * period_s)
    slow = settings(n_execute=1, min_points=2, lead_time_s=14 * period_s)
    with pytest.raises(parameters.ParameterError, match=r'lead_time_s 0\.7 s, got 1'):
        parameters.check_latency(small_contract, slow, 0.0)


def test_the_latency_of_a_bundle_is_measured_at_the_sparsity_that_will_be_used() -> None:
    assert parameters.model_options(settings(sparsity=0.3))[-1] == 0.3
    assert parameters.model_options(settings(sparsity=0.3, latency_budget_s=0.1))[-1] is None


def test_an_array_that_was_given_is_kept(ros: None) -> None:
    given = [Parameter('limits.joints', value=['elbow'])]
    node = rclpy.create_node('given', parameter_overrides=given)
    parameters.declare(node)
    assert list(parameters.read(node)['limits.joints']) == ['elbow']
    node.destroy_node()


def test_off_without_quotes_is_refused_by_name(ros: None) -> None:
    node = rclpy.create_node('off', cli_args=['--ros-args', '-p', 'limits.urdf:=off'])
    with pytest.raises(parameters.ParameterError, match=r'limits\.urdf: .* quote it'):
        parameters.declare(node)
    node.destroy_node()


@pytest.mark.fault
@pytest.mark.parametrize(
    ('given', 'nearest'),
    [
        ('emergency_stop_timout_s:=0.3', 'emergency_stop_timeout_s'),
        ('limts.velocity:=[1.0]', 'limits.velocity'),
    ],
)
def test_a_misspelt_override_is_refused_with_the_nearest_name(
    ros: None, given: str, nearest: str
) -> None:
    node = rclpy.create_node('misspelt', cli_args=['--ros-args', '-p', given])
    name = given.partition(':=')[0]
    with pytest.raises(parameters.ParameterError, match=f"'{name}': .* nearest is '{nearest}'"):
        parameters.declare(node)
    node.destroy_node()


def test_overrides_that_rclpy_declares_itself_are_no_mistake(ros: None) -> None:
    given = ['--ros-args', '-p', 'use_sim_time:=true', '-p', 'sparsity:=0.5']
    node = rclpy.create_node('known', cli_args=given)
    parameters.declare(node)
    assert parameters.read(node)['sparsity'] == 0.5
    node.destroy_node()
