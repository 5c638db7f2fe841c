# SPDX-License-Identifier: Apache-2.0
"""Bad input to a live node: the reason is reported, and nothing appears on joint_trajectory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')
pytest.importorskip('torch', reason='torch is not installed')

from cell import reported
from feeder import Feeder
from processes import RosProcess, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rclpy.node import Node

pytestmark = pytest.mark.fault

QUIET_S = 0.6


@pytest.fixture(scope='module')
def node_process(small_bundle: Path) -> Iterator[RosProcess]:
    """Start one unconfigured node for all tests of this module."""
    # An untrained policy starts anywhere.
    values = ['enable_output:=true', 'limits.first_point_default:=9.0']
    values += ['limits.allow_unbounded:=true', 'frozen_joints_s:=0.0']
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
    reported(unconfigured, f'configure failed: BundleError: {tmp_path / "nowhere"}')


def test_missing_weights_leave_the_node_unconfigured(
    unconfigured: Feeder, small_bundle: Path, tmp_path: Path
) -> None:
    copy = spoiled_bundle(small_bundle, tmp_path, 'name: random', 'name: other')
    (copy / 'policy.safetensors').unlink()
    assert unconfigured.set(bundle=str(copy)) == ''
    assert not unconfigured.change('configure')
    reported(unconfigured, f'configure failed: BundleError: {copy / "policy.safetensors"}')


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


# Refused while active; test_sensor_faults.py has what goes wrong in motion


@pytest.mark.parametrize('silent', ['camera', 'joints'])
def test_input_that_never_came_is_named_and_gives_no_command(active: Feeder, silent: str) -> None:
    setattr(active, f'spoil_{"image" if silent == "camera" else silent}', lambda message: None)
    active.start()
    reported(active, f'no chunk: {silent}: nothing received yet')
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
