# SPDX-License-Identifier: Apache-2.0
"""The simulated Panda as its topics show it: joint names, rest pose, camera and control period."""

from __future__ import annotations

import numpy as np

ARM_JOINTS = tuple(f'panda_joint{i}' for i in range(1, 8))
FINGER_JOINT = 'panda_finger_joint1'
MIRROR_JOINT = 'panda_finger_joint2'
COMMAND_JOINTS = (*ARM_JOINTS, FINGER_JOINT)
STATE_JOINTS = (*COMMAND_JOINTS, MIRROR_JOINT)
HOME_RAD = (0.0, np.pi / 16, 0.0, -np.pi / 2 - np.pi / 3, 0.0, np.pi - 0.2, np.pi / 4)
FINGER_OPEN_M = 0.04
CONTROL_PERIOD_S = 0.01
FRAME_S = 0.05
CAMERA_KEY = 'camera'
CAMERA_SIZE = 96
