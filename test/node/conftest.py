# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the fault tests: an arm in motion, and one node a module in its NAMESPACE."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from feeder import Feeder
    from processes import RosProcess
    from rclpy.node import Node
    from witness import Witness


@pytest.fixture(scope='module')
def process(request: pytest.FixtureRequest, small_bundle: Path) -> Iterator[RosProcess]:
    """One node for most faults: that it survives them all is part of the test."""
    from cell import start_node

    process = start_node(small_bundle, request.module.NAMESPACE)
    yield process
    assert process.stop() == 0, process.output


@pytest.fixture(scope='module')
def witness(request: pytest.FixtureRequest, test_node: Node) -> Witness:
    from witness import Witness

    return Witness(test_node, request.module.NAMESPACE)


@pytest.fixture(scope='module')
def module_feeder(
    request: pytest.FixtureRequest, test_node: Node, witness: Witness, process: RosProcess
) -> Iterator[Feeder]:
    from feeder import Feeder
    from processes import wait_until

    feeder = Feeder(test_node, request.module.NAMESPACE)
    wait_until(lambda: feeder.matched, 20, f'subscriptions\n{process.output}')
    feeder.start()
    yield feeder
    feeder.stop()


@pytest.fixture
def arm(module_feeder: Feeder, process: RosProcess, witness: Witness) -> Iterator[Feeder]:
    """Give an arm in motion; afterwards take the fault away and see that it moves again."""
    from cell import moving
    from feeder import JOINT_PERIOD_S
    from processes import wait_until

    feeder = module_feeder
    moving(feeder, process.output[-3000:])
    wait_until(lambda: feeder.status and feeder.status.level == b'\x00', 4, 'an OK in diagnostics')
    feeder.forget()
    yield feeder
    feeder.period_s = JOINT_PERIOD_S
    feeder.spoil_image = feeder.spoil_joints = lambda message: message
    feeder.inject('')
    if feeder.state() == 'inactive':
        # What deactivates the node needs somebody to look at it.
        assert feeder.change('cleanup')
        assert feeder.change('configure')
        wait_until(lambda: feeder.matched, 5, 'subscriptions')
        assert feeder.change('activate')
    moving(feeder, process.output[-3000:])
    assert witness.assert_safe() >= 2
