# SPDX-License-Identifier: Apache-2.0
"""Bad input to a live node: the reason is reported, and nothing appears on joint_trajectory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')
pytest.importorskip('torch', reason='torch is not installed')

from feeder import HEIGHT, WIDTH, Feeder
from processes import RosProcess, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rclpy.node import Node
    from sensor_msgs.msg import Image, JointState

pytestmark = pytest.mark.fault

QUIET_S = 0.6


@pytest.fixture(scope='module')
def node_process(small_bundle: Path) -> Iterator[RosProcess]:
    """Start one unconfigured node for all tests of this module."""
    # An untrained policy starts anywhere.
    values = ('enable_output:=true', 'limits.first_point_default:=9.0')
    arguments = [item for value in values for item in ('-p', value)]
    process = RosProcess('tts_policy.node.policy_node', '--ros-args', *arguments)
    yield process
    status = process.stop()
    assert status == 0, process.output


@pytest.fixture(scope='module')
def module_feeder(test_node: Node, node_process: RosProcess) -> Feeder:
    return Feeder(test_node)


@pytest.fixture
def unconfigured(module_feeder: Feeder, small_bundle: Path) -> Iterator[Feeder]:
    """Give the node unconfigured, with parameters that would work."""
    feeder = module_feeder
    assert feeder.set(bundle=str(small_bundle), sampler='ddim10', sparsity=0.8) == ''
    feeder.forget()
    yield feeder
    assert feeder.state() == 'unconfigured'
    assert not feeder.commands


@pytest.fixture
def active(module_feeder: Feeder, small_bundle: Path) -> Iterator[Feeder]:
    """Give the node active, with a robot that is not publishing yet."""
    feeder = module_feeder
    feeder.spoil_image = feeder.spoil_joints = lambda message: message
    assert feeder.set(bundle=str(small_bundle), sampler='ddim10', sparsity=0.8) == ''
    assert feeder.change('configure')
    wait_until(lambda: feeder.matched, 5, 'subscriptions')
    assert feeder.change('activate')
    feeder.forget()
    yield feeder
    feeder.stop()
    assert feeder.change('deactivate')
    assert feeder.change('cleanup')


def reported(feeder: Feeder, reason: str, level: bytes = b'\x02') -> str:
    """Wait for a diagnostics message of that level that contains the reason."""

    def message() -> str:
        status = feeder.status
        matches = status is not None and status.level == level and reason in status.message
        return status.message if matches else ''

    try:
        return str(wait_until(message, 4, f'diagnostics with {reason!r}'))
    except pytest.fail.Exception as error:
        raise AssertionError(f'{error}; last was {feeder.status}') from error


# Refused at configure


def spoiled_bundle(small_bundle: Path, folder: Path, old: str, new: str) -> Path:
    """Copy the bundle with one replacement in model.yaml."""
    copy = folder / 'bundle'
    copy.mkdir()
    for file in small_bundle.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    text = (copy / 'model.yaml').read_text()
    assert old in text
    (copy / 'model.yaml').write_text(text.replace(old, new, 1))
    return copy


def test_missing_bundle_file_leaves_the_node_unconfigured(
    unconfigured: Feeder, tmp_path: Path
) -> None:
    assert unconfigured.set(bundle=str(tmp_path / 'nowhere')) == ''
    assert not unconfigured.change('configure')
    assert 'nowhere' in reported(unconfigured, 'configure failed')


def test_missing_weights_leave_the_node_unconfigured(
    unconfigured: Feeder, small_bundle: Path, tmp_path: Path
) -> None:
    copy = spoiled_bundle(small_bundle, tmp_path, 'name: random', 'name: other')
    (copy / 'policy.safetensors').unlink()
    assert unconfigured.set(bundle=str(copy)) == ''
    assert not unconfigured.change('configure')
    assert 'policy.safetensors' in reported(unconfigured, 'configure failed')


def test_no_bundle_and_unknown_sampler_are_named(unconfigured: Feeder) -> None:
    assert unconfigured.set(bundle='') == ''
    assert not unconfigured.change('configure')
    reported(unconfigured, 'bundle: expected the path of a model bundle, got none')
    assert unconfigured.set(sampler='ddim7') == ''


def test_sampler_the_bundle_does_not_have_is_refused(unconfigured: Feeder) -> None:
    assert unconfigured.set(sampler='ddim7') == ''
    assert not unconfigured.change('configure')
    reported(unconfigured, "got 'ddim7'")


def test_sparsity_above_the_limit_of_the_bundle_is_refused_at_configure(
    unconfigured: Feeder,
) -> None:
    assert unconfigured.set(sparsity=0.95) == ''
    assert not unconfigured.change('configure')
    reported(unconfigured, 'sparsity: expected a number in [0, 0.9]')


def test_limits_for_joints_the_bundle_does_not_have_are_refused(unconfigured: Feeder) -> None:
    assert unconfigured.set(limits__joints=['shoulder', 'elbow', 'thumb']) == ''
    assert not unconfigured.change('configure')
    reported(unconfigured, 'limits.joints: expected exactly the joints of the bundle')
    assert unconfigured.set(limits__joints=['shoulder', 'elbow', 'finger']) == ''
    assert unconfigured.set(limits__lower=[0.0, 0.0]) == ''
    assert not unconfigured.change('configure')
    reported(unconfigured, 'limits.lower: expected 3 numbers')
    assert unconfigured.set(limits__lower=[-9.0] * 3) == ''


# Refused while live


def resize(message: Image) -> Image:
    message.height, message.data = HEIGHT // 2, message.data[: HEIGHT // 2 * message.step]
    return message


def change(field: str, value: Any) -> Callable[[Any], Any]:
    """Return a spoiler that sets one field."""

    def spoil(message: Any) -> Any:
        setattr(message, field, value)
        return message

    return spoil


def truncate(message: Image) -> Image:
    message.data = message.data[:-1]
    return message


@pytest.mark.parametrize(
    ('spoil', 'reason'),
    [
        (change('encoding', '16UC1'), 'camera/image: expected encoding rgb8, bgr8, rgba8, bgra8'),
        (resize, f'camera/image: expected an image of {HEIGHT} x {WIDTH}'),
        (truncate, f'camera/image: expected {HEIGHT * WIDTH * 3} bytes (height {HEIGHT} x step'),
        (change('step', WIDTH), 'camera/image: expected step of at least 96 bytes'),
        (lambda message: None, 'no chunk: camera: nothing received yet'),
    ],
    ids=['encoding', 'size', 'too few bytes', 'step', 'no camera'],
)
def test_bad_images_give_no_command(
    active: Feeder, spoil: Callable[[Image], Image | None], reason: str
) -> None:
    active.spoil_image = spoil
    active.start()
    reported(active, reason)
    time.sleep(QUIET_S)
    assert not active.commands


def without_elbow(message: JointState) -> JointState:
    message.name, message.position = ['finger', 'shoulder'], [0.1, 0.3]
    return message


@pytest.mark.parametrize(
    ('spoil', 'reason'),
    [
        (without_elbow, "joint_states: expected joints ['shoulder', 'elbow', 'finger'], missing"),
        (change('name', ['finger', 'spare', 'Elbow', 'shoulder']), "missing ['elbow']"),
        (change('position', [0.1, 9.0, np.nan, 0.3]), "expected finite positions, got {'elbow'"),
        (change('position', [0.1, 9.0, 0.3]), 'got 4 names and 3 positions'),
        (lambda message: None, 'no chunk: joints: nothing received yet'),
    ],
    ids=['missing joint', 'wrong names', 'NaN', 'too short', 'no joint states'],
)
def test_bad_joint_states_give_no_command(
    active: Feeder, spoil: Callable[[JointState], JointState | None], reason: str
) -> None:
    active.spoil_joints = spoil
    active.start()
    reported(active, reason)
    time.sleep(QUIET_S)
    assert not active.commands


def test_camera_that_stops_stops_the_commands_and_is_named(active: Feeder) -> None:
    active.start()
    wait_until(lambda: len(active.commands) >= 2, 5, 'commands')
    active.spoil_image = lambda message: None
    reported(active, 'camera: nothing for')
    active.silent()
    active.ticks.clear()
    active.spoil_image = lambda message: message
    wait_until(lambda: active.commands, 5, 'commands of a camera that came back')
    wait_until(lambda: any(t['reset'] == 'camera: gap' for t in active.ticks), 2, 'a reset')


def test_frozen_camera_is_as_good_as_none(active: Feeder) -> None:
    frozen: list[Image] = []

    def freeze(message: Image) -> Image:
        frozen.append(message)
        return frozen[0]

    active.spoil_image = freeze
    active.start()
    reported(active, 'camera: nothing for')
    assert not active.commands


def test_a_camera_stamped_in_the_future_is_named_and_gives_no_command(active: Feeder) -> None:
    def postdate(message: Image) -> Image:
        message.header.stamp.sec += 3600
        return message

    active.spoil_image = postdate
    active.start()
    reported(active, 'camera/image: message is future, stamped +')
    time.sleep(QUIET_S)
    assert not active.commands


def test_a_chunk_beyond_the_limits_is_dropped_whole(module_feeder: Feeder) -> None:
    feeder, names = module_feeder, ['shoulder', 'elbow', 'finger']
    feeder.spoil_image = feeder.spoil_joints = lambda message: message
    assert feeder.set(limits__joints=names, limits__first_point=[1e-9] * 3) == ''
    assert feeder.change('configure')
    wait_until(lambda: feeder.matched, 5, 'subscriptions')
    assert feeder.change('activate')
    feeder.forget()
    feeder.start()
    try:
        reported(feeder, 'chunk refused: shoulder: expected distance of the first point')
        wait_until(lambda: feeder.ticks, 3, 'statistics of a refused chunk')
        assert 'shoulder' in feeder.ticks[-1]['refused']
        assert not feeder.commands
    finally:
        feeder.stop()
        assert feeder.change('deactivate')
        assert feeder.change('cleanup')
        assert feeder.set(limits__first_point=[9.0] * 3) == ''
