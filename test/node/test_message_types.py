# SPDX-License-Identifier: Apache-2.0
"""Definitions made from the classes of installed messages are those that ROS 2 has of them."""

from __future__ import annotations

import pytest
from rosbags.typesys import Stores, get_typestore
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
