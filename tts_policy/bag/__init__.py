# SPDX-License-Identifier: Apache-2.0
"""Rosbag2 recordings: reading, replay and offline evaluation; needs no ROS but for replay."""
