# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the simulator tests: one world per session, robots in processes of their own."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import BUSY_FACTOR, child_environment

START_LIMIT_S = 90.0
_domains = itertools.count(os.getpid() % 80)


class Robot:
    """A robot_node process and a client of it in a domain of their own."""

    def __init__(self, log_directory: Path, **parameters: object) -> None:
        import rclpy
        from rclpy.executors import SingleThreadedExecutor

        self._log = log_directory / 'robot.log'
        self._domain = 10 + next(_domains) % 90
        arguments = itertools.chain.from_iterable(
            ('-p', f'{name}:={value}') for name, value in parameters.items()
        )
        command = [sys.executable, '-m', 'tts_policy.sim.robot_node', '--ros-args', *arguments]
        environment = child_environment(
            ROS_DOMAIN_ID=str(self._domain),
            ROS_AUTOMATIC_DISCOVERY_RANGE='LOCALHOST',
            ROS_LOG_DIR=str(log_directory),
            ROS_PYTHON_CHECK_FIELDS='1',
            OMP_NUM_THREADS='1',
        )
        with self._log.open('w') as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        self._context = rclpy.Context()
        rclpy.init(context=self._context, domain_id=self._domain)
        self.node = rclpy.create_node('client', context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self._subscribe()

    def _subscribe(self) -> None:
        from rclpy.parameter_client import AsyncParameterClient
        from rclpy.qos import DurabilityPolicy, QoSProfile
        from rosgraph_msgs.msg import Clock
        from sensor_msgs.msg import Image, JointState
        from std_msgs.msg import String
        from std_srvs.srv import Trigger
        from trajectory_msgs.msg import JointTrajectory

        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self.images: list[Image] = []
        self.states: list[JointState] = []
        self.clocks: list[Clock] = []
        self.reports: list[dict[str, Any]] = []
        for kind, topic, store, qos in (
            (Image, 'camera/image', self.images.append, 100),
            (JointState, 'joint_states', self.states.append, 1000),
            (Clock, '/clock', self.clocks.append, 1000),
            (String, 'robot/episode', lambda m: self.reports.append(json.loads(m.data)), latched),
        ):
            self.node.create_subscription(kind, topic, store, qos)
        self._commands = self.node.create_publisher(JointTrajectory, 'joint_trajectory', 1)
        self._reset = self.node.create_client(Trigger, 'robot/reset')
        self._parameters = AsyncParameterClient(self.node, 'robot')

    def wait(self, condition: Callable[[], bool], limit_s: float = BUSY_FACTOR * 20.0) -> bool:
        """Serve messages until the condition holds; False after limit_s."""
        end = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > end or self.process.poll() is not None:
                return condition()
            self._executor.spin_once(timeout_sec=0.05)
        return True

    def ready(self) -> None:
        """Wait until the robot is there and every endpoint is matched."""

        def matched() -> bool:
            return (
                self._reset.service_is_ready()
                and self._parameters.services_are_ready()
                and self._commands.get_subscription_count() > 0
                and self.node.count_publishers('camera/image') > 0
                and self.node.count_publishers('joint_states') > 0
            )

        assert self.wait(matched, START_LIMIT_S), self.log()

    def reset(self) -> str:
        """Start the next episode; returns the service's message."""
        from std_srvs.srv import Trigger

        # What the last episode has sent but this client not yet taken must not count as new.
        self.wait(lambda: False, 0.3)
        self.images.clear()
        self.states.clear()
        self.clocks.clear()
        self.reports.clear()
        future = self._reset.call_async(Trigger.Request())
        assert self.wait(future.done), self.log()
        return str(future.result().message)

    def set_parameter(self, name: str, value: int | float) -> None:
        """Set a parameter of the robot; the test fails if it is refused."""
        from rclpy.parameter import Parameter

        future = self._parameters.set_parameters([Parameter(name, value=value)])
        assert self.wait(future.done), self.log()
        assert future.result().results[0].successful, future.result().results[0].reason

    def command(
        self, stamp_ns: int, positions: dict[str, float], seconds: tuple[float, ...] = (0.05,)
    ) -> None:
        """Publish a trajectory that reaches `positions` at each of the given times."""
        from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

        message = JointTrajectory(joint_names=list(positions))
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(stamp_ns, 10**9)
        for due_s in seconds:
            point = JointTrajectoryPoint(positions=list(positions.values()))
            point.time_from_start.nanosec = round(due_s * 1e9)
            message.points.append(point)
        self._commands.publish(message)

    def log(self) -> str:
        """What the robot's process has written so far."""
        return self._log.read_text()

    def stop(self) -> int:
        """Interrupt the process as a user would; returns its exit status."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGINT)
        try:
            status = self.process.wait(timeout=BUSY_FACTOR * 20.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self._executor.shutdown()
        self.node.destroy_node()
        self._context.try_shutdown()
        return status


@pytest.fixture(scope='module')
def start_robot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Robot]]:
    """Start robots in processes of their own; they are stopped after the module."""
    pytest.importorskip('rclpy', reason='rclpy is not installed')
    pytest.importorskip('robosuite', reason='robosuite is not installed')
    robots: list[Robot] = []

    def start(**parameters: object) -> Robot:
        robot = Robot(tmp_path_factory.mktemp('robot'), **{'listeners': 1, **parameters})
        robots.append(robot)
        robot.ready()
        return robot

    yield start
    for robot in robots:
        robot.stop()
