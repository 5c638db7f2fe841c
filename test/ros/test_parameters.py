# SPDX-License-Identifier: Apache-2.0
"""Declared parameters: every one has a value from the start, and YAML's traps are named."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')

import rclpy
from rclpy.parameter import Parameter

from tts_policy.ros import parameters
from tts_policy.ros.parameter_table import PARAMETERS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rclpy.node import Node


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
