# SPDX-License-Identifier: Apache-2.0
"""Definitions made from the classes of installed messages are those that ROS 2 has of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from recordings import START_NS, STORE, Recording
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from rosbags.typesys.store import Typestore

from tts_policy.node.message_types import message_class, typestore_with

pytest.importorskip('rclpy', reason='rclpy is not installed')


@pytest.mark.parametrize(
    'msgtype',
    [
        'sensor_msgs/msg/CameraInfo',
        'sensor_msgs/msg/CompressedImage',
        'sensor_msgs/msg/JointState',
        'trajectory_msgs/msg/JointTrajectory',
        'diagnostic_msgs/msg/DiagnosticArray',
        'std_msgs/msg/Float64MultiArray',
        'rcl_interfaces/msg/ParameterDescriptor',
        'lifecycle_msgs/msg/TransitionEvent',
    ],
)
def test_a_type_made_from_its_class_has_the_fields_and_the_hash_of_ros(msgtype: str) -> None:
    known, made = get_typestore(Stores.ROS2_JAZZY), Typestore()
    typestore_with(msgtype, made)
    assert made.fielddefs[msgtype][1] == known.fielddefs[msgtype][1]
    assert made.hash_rihs01(msgtype) == known.hash_rihs01(msgtype)


@pytest.mark.fault
@pytest.mark.parametrize('msgtype', ['own_msgs/msg/Angle', 'sensor_msgs/msg/Nothing', 'Image'])
def test_a_type_that_is_not_installed_is_an_import_error(msgtype: str) -> None:
    with pytest.raises(ImportError):
        message_class(msgtype)


def write_package(folder: Path, name: str) -> Path:
    """Write a package of messages that says so when it is imported; returns where it would."""
    for module in (name, f'{name}/msg'):
        (folder / module).mkdir(parents=True)
        code = f'open({str(folder / "ran")!r}, "w").close()\nclass X:\n    pass\n'
        (folder / module / '__init__.py').write_text(code)
    return folder / 'ran'


@pytest.mark.fault
@pytest.mark.parametrize('listed', [False, True], ids=['not listed', 'listed elsewhere'])
@pytest.mark.parametrize('here', [False, True], ids=['on the path', 'working directory'])
def test_a_module_that_is_no_installed_interface_package_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: bool, here: bool
) -> None:
    ran = write_package(tmp_path, 'hostile_msgs')
    monkeypatch.syspath_prepend(tmp_path)
    if here:
        monkeypatch.chdir(tmp_path)
    if listed:
        index = tmp_path / 'prefix/share/ament_index/resource_index/rosidl_interfaces'
        index.mkdir(parents=True)
        (index / 'hostile_msgs').touch()
        monkeypatch.setenv('AMENT_PREFIX_PATH', str(tmp_path / 'prefix'))
    with pytest.raises(ImportError, match='hostile_msgs: expected an installed interface package'):
        message_class('hostile_msgs/msg/X')
    assert not ran.exists()


def test_a_package_of_a_workspace_is_found_by_its_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = tmp_path / 'install/arm_msgs'
    site = prefix / 'lib/python3.11/site-packages'
    ran = write_package(site, 'arm_msgs')
    index = prefix / 'share/ament_index/resource_index/rosidl_interfaces'
    index.mkdir(parents=True)
    (index / 'arm_msgs').touch()
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv('AMENT_PREFIX_PATH', str(prefix))
    assert message_class('arm_msgs/msg/X').__name__ == 'X' and ran.exists()


@pytest.mark.fault
@pytest.mark.parametrize('msgtype', ['this/msg/X', 'hostile_msgs/msg/X'])
def test_playing_a_recording_runs_nothing_that_lies_beside_it(
    tmp_path: Path, msgtype: str
) -> None:
    STORE.register(get_types_from_msg('float64 angle', msgtype))
    message = STORE.types[msgtype](0.5)
    Recording(frames=1).write(tmp_path / 'bag', [('/angle', START_NS, message)])
    ran = write_package(tmp_path, 'hostile_msgs')
    command = [sys.executable, '-m', 'tts_policy.node.play_bag', 'bag', '--topics', '/angle']
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and 'expected an installed interface package' in ended.stderr
    assert not ran.exists() and 'Zen of Python' not in ended.stdout
