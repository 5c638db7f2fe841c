# SPDX-License-Identifier: Apache-2.0
"""Commands as goals of FollowJointTrajectory, to a controller in a process of its own."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')
pytest.importorskip('torch', reason='torch is not installed')
pytest.importorskip('control_msgs', reason='control_msgs is not installed (not on PyPI)')

from action_msgs.srv import CancelGoal
from cell import FOLDER, reported, start_node
from feeder import RELIABLE, Feeder
from processes import BUSY_FACTOR, RosProcess, wait_until
from rcl_interfaces.srv import SetParameters
from rclpy.parameter import Parameter
from trajectory_msgs.msg import JointTrajectory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rclpy.node import Node

pytestmark = pytest.mark.fault

NAMESPACE = '/action_output'


class Controller:
    """The process of the action server, and what it takes."""

    def __init__(self, node: Node) -> None:
        self.goals: list[JointTrajectory] = []
        self._process: RosProcess | None = None
        node.create_subscription(
            JointTrajectory, f'{NAMESPACE}/taken', self.goals.append, RELIABLE
        )
        self._set = node.create_client(SetParameters, f'{NAMESPACE}/controller/set_parameters')
        action = f'{NAMESPACE}/follow_joint_trajectory/_action'
        self._cancel = node.create_client(CancelGoal, f'{action}/cancel_goal')

    def start(self) -> None:
        """Start the process; the one before has ended."""
        self._process = RosProcess('trajectory_server', NAMESPACE, PYTHONPATH=FOLDER)

    def kill(self) -> None:
        """End the process without a word."""
        if self._process is not None:
            self._process.send(signal.SIGKILL)
            self._process.wait(BUSY_FACTOR * 5.0)
            self._process = None

    def answer(self, what: str) -> None:
        """Let it accept, reject or abort from now on."""
        parameter = Parameter('answer', value=what).to_parameter_msg()
        self._call(self._set, SetParameters.Request(parameters=[parameter]))

    def cancel(self) -> None:
        """Cancel every goal, as an operator at another screen would."""
        self._call(self._cancel, CancelGoal.Request())

    @staticmethod
    def _call(client: Any, request: Any) -> None:
        wait_until(client.service_is_ready, 10, client.srv_name)
        wait_until(client.call_async(request).done, 10, client.srv_name)

    def following(self) -> None:
        """Wait until new goals come."""
        self.goals.clear()
        wait_until(lambda: len(self.goals) >= 2, 10, 'goals')


@pytest.fixture(scope='module')
def process(small_bundle: Path) -> Iterator[RosProcess]:
    """One node for all that a controller does; it is there before the controller is."""
    process = start_node(small_bundle, NAMESPACE, output='action')
    yield process
    assert process.stop() == 0, process.output


@pytest.fixture(scope='module')
def feeder(test_node: Node, process: RosProcess) -> Iterator[Feeder]:
    feeder = Feeder(test_node, NAMESPACE)
    wait_until(lambda: feeder.matched, 20, f'subscriptions\n{process.output}')
    feeder.start()
    yield feeder
    feeder.stop()


@pytest.fixture(scope='module')
def controller(test_node: Node, feeder: Feeder) -> Iterator[Controller]:
    """Give a controller that starts late: until then the node says what is missing."""
    controller = Controller(test_node)
    reported(feeder, 'follow_joint_trajectory: expected an action server, got none')
    controller.start()
    controller.following()
    yield controller
    controller.kill()


def well(feeder: Feeder) -> None:
    """Wait until diagnostics are OK."""
    wait_until(lambda: feeder.status and feeder.status.level == b'\x00', 10, 'an OK')


def test_goals_replace_each_other_and_name_every_joint(
    feeder: Feeder, controller: Controller
) -> None:
    controller.following()
    assert all(g.joint_names == ['shoulder', 'elbow', 'finger'] for g in controller.goals)
    assert all(len(g.points) > 1 for g in controller.goals)
    well(feeder)
    assert not feeder.commands


@pytest.mark.parametrize(
    ('answer', 'reason'),
    [
        ('reject', 'expected the goal to be accepted, it was not'),
        ('abort', 'the goal was aborted: elbow is off its path'),
    ],
)
def test_what_a_controller_refuses_is_reported_until_it_takes_goals_again(
    feeder: Feeder, controller: Controller, answer: str, reason: str
) -> None:
    controller.answer(answer)
    reported(feeder, reason)
    controller.answer('accept')
    controller.following()
    well(feeder)


def test_a_goal_that_somebody_cancels_is_reported_and_the_next_one_is_followed(
    feeder: Feeder, controller: Controller
) -> None:
    controller.following()
    controller.cancel()
    reported(feeder, 'the goal was canceled: somebody cancelled it')
    controller.following()
    well(feeder)


def test_a_controller_that_dies_is_missed_and_taken_up_again(
    feeder: Feeder, controller: Controller
) -> None:
    controller.kill()
    reported(feeder, 'expected an action server, got none')
    controller.start()
    controller.following()
    well(feeder)


def test_a_closed_gate_sends_a_hold_goal_and_so_does_the_end(
    feeder: Feeder, controller: Controller, process: RosProcess
) -> None:
    assert feeder.set(enable_output=False) == ''
    wait_until(lambda: len(controller.goals[-1].points) == 1, 5, 'a hold')
    assert feeder.set(enable_output=True) == ''
    controller.following()
    process.send(signal.SIGINT)
    assert process.wait(BUSY_FACTOR * 10.0) == 0
    wait_until(lambda: len(controller.goals[-1].points) == 1, 5, 'a hold at the end')
