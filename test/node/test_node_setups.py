# SPDX-License-Identifier: Apache-2.0
"""Setups of the node: several cameras, compressed ones, a gripper, two nodes, many lives."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')
pytest.importorskip('torch', reason='torch is not installed')

import cv2
from cell import reported
from feeder import JOINTS, RELIABLE, Feeder, joint_message
from processes import BUSY_FACTOR, RosProcess, child_environment, wait_until
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray
from trajectory_msgs.msg import JointTrajectory

from tts_policy.node.messages import CELL_PIXELS, ns_to_time
from tts_policy.policy.plan import plan_rgb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rclpy.node import Node

MODULE = 'tts_policy.node.policy_node'


def start(bundle: Path, namespace: str, **values: Any) -> RosProcess:
    """Start an active node; an untrained policy starts anywhere."""
    arguments = ['--ros-args', '-r', f'__ns:={namespace}']
    free = {'limits.first_point_default': 9.0, 'limits.allow_unbounded': 'true'}
    free['frozen_joints_s'] = 0.0  # the scripted robot does not move
    given = {'bundle': bundle, 'autostart': 'true', **free, **values}
    for name, value in given.items():
        arguments += ['-p', f'{name}:={value}']
    return RosProcess(MODULE, *arguments)


@pytest.fixture(scope='module')
def two_cameras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a bundle that sees a front and a wrist camera of different sizes."""
    from tts_policy.policy.bundle import save_random_bundle
    from tts_policy.policy.contract import ActionSpec, CameraSpec, ObservationSpec, PolicyContract
    from tts_policy.policy.network import NetworkSpec
    from tts_policy.policy.sampler import SamplerSpec
    from tts_policy.policy.schedulers.scheduler import SchedulerSpec

    cameras = (CameraSpec('front', 24, 32), CameraSpec('wrist', 16, 16))
    contract = PolicyContract(
        ObservationSpec(cameras, JOINTS, steps=2, period_s=0.05),
        ActionSpec(JOINTS, horizon=16, execute=8, offset_steps=1),
    )
    folder = tmp_path_factory.mktemp('two_cameras')
    samplers = {'ddim10': SamplerSpec(SchedulerSpec('ddim', 10), recommended_sparsity=0.8)}
    save_random_bundle(folder, contract, samplers, NetworkSpec(width=32, layers=2, heads=2))
    return folder


@pytest.fixture
def publish(test_node: Node) -> Iterator[Callable[[dict[str, Callable[[], Any]], str], None]]:
    """Publish joint states and the given topics at 20 Hz until the test ends."""
    ended = threading.Event()
    threads: list[threading.Thread] = []
    publishers: list[Any] = []

    def begin(topics: dict[str, Callable[[], Any]], namespace: str) -> None:
        made = {
            name: test_node.create_publisher(type(make()), f'{namespace}/{name}', RELIABLE)
            for name, make in topics.items()
        }
        states = test_node.create_publisher(JointState, f'{namespace}/joint_states', RELIABLE)
        publishers.extend([*made.values(), states])

        def run() -> None:
            while not ended.is_set():
                stamp_ns = time.time_ns()
                states.publish(joint_message(stamp_ns))
                for name, make in topics.items():
                    message = make()
                    message.header.stamp = ns_to_time(stamp_ns)
                    made[name].publish(message)
                time.sleep(0.05)

        threads.append(threading.Thread(target=run, daemon=True))
        threads[-1].start()

    yield begin
    ended.set()
    for thread in threads:
        thread.join()
    for publisher in publishers:
        test_node.destroy_publisher(publisher)


def picture(height: int, width: int) -> Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image(
        height=height, width=width, encoding='rgb8', step=3 * width, data=pixels.tobytes()
    )


def jpeg(height: int, width: int) -> CompressedImage:
    pixels = np.frombuffer(picture(height, width).data, np.uint8).reshape(height, width, 3)
    return CompressedImage(format='jpeg', data=cv2.imencode('.jpg', pixels)[1].tobytes())


def test_two_cameras_one_of_them_compressed_and_of_another_size(
    test_node: Node,
    two_cameras: Path,
    publish: Callable[[dict[str, Callable[[], Any]], str], None],
) -> None:
    namespace = '/cameras'
    feeder = Feeder(test_node, namespace)
    process = start(two_cameras, namespace, compressed_cameras='[wrist]', image_fit='crop')
    try:
        publish(
            {
                'front/image': lambda: picture(24, 32),
                'wrist/image/compressed': lambda: jpeg(48, 64),
            },
            namespace,
        )
        wait_until(lambda: len(feeder.ticks) >= 2, 20, f'ticks\n{process.output}')
        ages = {'observation_age_s front', 'observation_age_s wrist'}
        wait_until(lambda: ages <= set(feeder.values()), 3, 'diagnostics')
    finally:
        assert process.stop() == 0


def test_a_camera_that_is_not_the_bundles_is_refused_at_configure(
    test_node: Node, two_cameras: Path
) -> None:
    process = start(two_cameras, '/no_camera', compressed_cameras='[rear]')
    try:
        wait_until(lambda: "got ['rear']" in process.output, 20, 'the reason')
        assert Feeder(test_node, '/no_camera').state() == 'unconfigured'
    finally:
        assert process.stop() == 0


def ended(messages: list[Any], quiet_s: float = 0.5) -> bool:
    """Whether nothing comes any more."""
    before = len(messages)
    time.sleep(quiet_s)
    return len(messages) == before


@pytest.mark.parametrize('kind', ['joint_trajectory', 'float64_multi_array', 'none'])
def test_a_gripper_has_a_topic_of_its_own(test_node: Node, small_bundle: Path, kind: str) -> None:
    namespace = f'/gripper_{kind}'
    trajectories: list[JointTrajectory] = []
    numbers: list[Float64MultiArray] = []
    subscriptions = [
        test_node.create_subscription(kind, f'{namespace}/gripper/{topic}', put, RELIABLE)
        for kind, topic, put in (
            (JointTrajectory, 'joint_trajectory', trajectories.append),
            (Float64MultiArray, 'commands', numbers.append),
        )
    ]
    feeder = Feeder(test_node, namespace)
    process = start(
        small_bundle, namespace, enable_output='true',
        **{'gripper.joints': '[finger]', 'gripper.output': kind},
    )  # fmt: skip
    try:
        wait_until(lambda: feeder.matched, 20, f'subscriptions\n{process.output}')
        feeder.start()
        wait_until(lambda: len(feeder.commands) >= 3, 10, f'commands\n{process.output}')
        assert feeder.set(enable_output=False) == ''
        wait_until(lambda: len(feeder.commands[-1].points) == 1, 2, 'hold')
        assert all(c.joint_names == ['shoulder', 'elbow'] for c in feeder.commands)
        expected = {'joint_trajectory': trajectories, 'float64_multi_array': numbers}.get(kind)
        if expected is not None:
            wait_until(lambda: len(expected) >= 3, 3, kind)
            wait_until(lambda: ended(expected), 3, f'an end of {kind}')
        counts = len(trajectories), len(numbers)
        assert [count >= 3 for count in counts] == [
            kind == 'joint_trajectory', kind == 'float64_multi_array'
        ]  # fmt: skip
        assert all(list(t.joint_names) == ['finger'] for t in trajectories)
        assert all(len(n.data) == 1 for n in numbers)
        time.sleep(0.5)
        assert (len(trajectories), len(numbers)) == counts
    finally:
        feeder.stop()
        for subscription in subscriptions:
            test_node.destroy_subscription(subscription)
        assert process.stop() == 0


def test_the_plan_is_shown_while_somebody_looks(test_node: Node, small_bundle: Path) -> None:
    feeder = Feeder(test_node, '/shown')
    process = start(small_bundle, '/shown')
    try:
        wait_until(lambda: feeder.matched, 20, f'subscriptions\n{process.output}')
        feeder.start()
        wait_until(lambda: len(feeder.ticks) >= 2, 10, f'ticks\n{process.output}')
        seen: list[Image] = []
        subscription = test_node.create_subscription(
            Image, '/shown/tts_policy/plan_image', seen.append, RELIABLE
        )
        image = wait_until(lambda: seen[-1] if seen else None, 5, 'a plan')
        test_node.destroy_subscription(subscription)
        stamp_ns = image.header.stamp.sec * 10**9 + image.header.stamp.nanosec
        plan = wait_until(
            lambda: next((t['plan'] for t in feeder.ticks if t['stamp_ns'] == stamp_ns), None),
            2,
            'the tick of the picture',
        )
        pixels = np.frombuffer(image.data, np.uint8).reshape(image.height, image.width, 3)
        cells = pixels[::CELL_PIXELS, ::CELL_PIXELS]
        assert np.array_equal(cells, plan_rgb(plan))
    finally:
        feeder.stop()
        assert process.stop() == 0


def test_action_output_without_control_msgs_is_refused_with_the_reason(
    test_node: Node, small_bundle: Path
) -> None:
    try:
        import control_msgs.action  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip('control_msgs is installed')
    process = start(small_bundle, '/action', output='action')
    try:
        wait_until(lambda: 'expected control_msgs' in process.output, 20, 'the reason')
        assert Feeder(test_node, '/action').state() == 'unconfigured'
    finally:
        assert process.stop() == 0


def test_an_unknown_choice_is_refused_at_configure_and_live(
    test_node: Node, small_bundle: Path
) -> None:
    process = start(small_bundle, '/choice', image_fit='stretch')
    try:
        wait_until(lambda: "'exact', 'resize', 'crop', got 'stretch'" in process.output, 20, 'it')
        feeder = Feeder(test_node, '/choice')
        assert "image_fit: expected one of 'exact'" in feeder.set(image_fit='squash')
        assert feeder.set(image_fit='crop') == ''
        assert feeder.change('configure')
    finally:
        assert process.stop() == 0


def test_two_nodes_in_two_namespaces_do_not_hear_each_other(
    test_node: Node, small_bundle: Path
) -> None:
    feeders = [Feeder(test_node, namespace) for namespace in ('/left', '/right')]
    processes = [start(small_bundle, n, enable_output='true') for n in ('/left', '/right')]
    left, right = feeders
    try:
        for feeder in feeders:
            wait_until(lambda feeder=feeder: feeder.matched, 20, 'subscriptions')
        left.start()
        wait_until(lambda: len(left.commands) >= 2, 10, f'commands\n{processes[0].output}')
        assert not right.ticks and not right.commands
        left.emergency_stop(True)
        right.start()
        wait_until(lambda: len(right.commands) >= 2, 10, f'commands\n{processes[1].output}')
        wait_until(lambda: len(left.commands[-1].points) == 1, 3, 'hold')
        assert left.set(sparsity=0.5) == ''
        right.forget()
        wait_until(lambda: right.ticks, 5, 'a tick')
        assert right.ticks[0]['requested_sparsity'] == 0.8
    finally:
        for feeder in feeders:
            feeder.stop()
        assert [process.stop() for process in processes] == [0, 0]


UNBOUNDED = 'expected bounds of position and velocity for every joint, got none on position of'
BOUNDED = {
    'limits.joints': '[shoulder, elbow, finger]',
    'limits.lower': '[-9.0, -9.0, -9.0]',
    'limits.upper': '[9.0, 9.0, 9.0]',
}


@pytest.mark.fault
def test_output_opens_only_within_limits_or_where_that_is_waived_for_all_to_see(
    test_node: Node, small_bundle: Path
) -> None:
    strict = {'limits.allow_unbounded': 'false', **BOUNDED}
    cases = {
        '/unbounded': {'limits.allow_unbounded': 'false', 'enable_output': 'true'},
        '/no_speed': strict,
        '/bounded': {**strict, 'limits.velocity': '[900.0, 900.0, 900.0]'},
        '/waived': {'enable_output': 'true'},
    }
    feeders = {name: Feeder(test_node, name) for name in cases}
    processes = [start(small_bundle, name, **values) for name, values in cases.items()]
    try:
        for feeder in feeders.values():
            wait_until(lambda feeder=feeder: feeder.matched, 20, 'subscriptions')
            feeder.start()
            wait_until(lambda feeder=feeder: len(feeder.ticks) >= 2, 10, 'ticks')
        closed = feeders['/unbounded']
        reported(closed, f'output closed: limits: {UNBOUNDED}')
        assert closed.proposals and not closed.commands
        assert UNBOUNDED not in feeders['/no_speed'].set(enable_output=True)
        refused = feeders['/no_speed'].set(enable_output=True)
        assert 'enable_output: limits: expected' in refused and 'velocity of' in refused
        assert feeders['/bounded'].set(enable_output=True) == ''
        for name in ('/bounded', '/waived'):
            wait_until(lambda name=name: feeders[name].commands, 5, f'commands of {name}')
        reported(feeders['/waived'], f'limits.allow_unbounded: limits: {UNBOUNDED}')
        assert not closed.commands and not feeders['/no_speed'].commands
    finally:
        for feeder in feeders.values():
            feeder.stop()
        assert [process.stop() for process in processes] == [0] * 4


LEGAL = {
    ('unconfigured', 'configure'): 'inactive',
    ('inactive', 'activate'): 'active',
    ('active', 'deactivate'): 'inactive',
    ('inactive', 'cleanup'): 'unconfigured',
}


def memory_mb(process: RosProcess) -> float:
    """Resident memory of a child."""
    pages = int(Path(f'/proc/{process._process.pid}/statm').read_text().split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE') / 1e6


@pytest.mark.slow
def test_a_hundred_transitions_in_any_order_leak_nothing(
    test_node: Node, small_bundle: Path, two_cameras: Path
) -> None:
    feeder = Feeder(test_node, '/lives')
    process = start(small_bundle, '/lives', autostart='false')
    rng = random.Random(0)
    state, made, memory = 'unconfigured', 0, []
    try:
        while made < 100:
            transition = rng.choice(['configure', 'activate', 'deactivate', 'cleanup'])
            expected = LEGAL.get((state, transition))
            if state == 'unconfigured':
                # Another bundle, with other cameras, every now and then.
                bundle = small_bundle if rng.random() < 0.7 else two_cameras
                assert feeder.set(bundle=str(bundle)) == ''
            if expected is None:
                feeder.ask(transition)
                continue
            assert feeder.change(transition)
            state, made = expected, made + 1
            memory.append(memory_mb(process))
        assert feeder.state() == state
        # The first lives fill caches of torch and of the middleware.
        assert memory[-1] - memory[40] < 15.0
        threads = len(list(Path(f'/proc/{process._process.pid}/task').iterdir()))
        assert threads < 40
    finally:
        assert process.stop() == 0


AUTOSTART = """
import rclpy, sys
from rclpy.executors import SingleThreadedExecutor
from tts_policy.node.policy_node import PolicyNode
rclpy.init(args=sys.argv)
node, executor = PolicyNode(), SingleThreadedExecutor()
executor.add_node(node)
states = []
while not states or states[-1] != 'active':
    executor.spin_once(timeout_sec=1.0)
    label = node._state_machine.current_state[1]
    states += [label] if states[-1:] != [label] else []
print('states:', *states)
node.trigger_shutdown()
"""


def test_a_stop_while_the_node_loads_is_heard_before_it_activates(small_bundle: Path) -> None:
    """Signals are looked at between two callbacks, so autostart takes two of them."""
    ran = subprocess.run(
        [sys.executable, '-c', AUTOSTART, '--ros-args', '-r', '__ns:=/autostart']
        + ['-p', f'bundle:={small_bundle}', '-p', 'autostart:=true'],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=BUSY_FACTOR * 20.0,
        check=False,
    )
    assert 'states: inactive active' in ran.stdout, ran.stdout + ran.stderr
