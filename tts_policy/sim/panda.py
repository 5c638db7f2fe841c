# SPDX-License-Identifier: Apache-2.0
"""The simulated Panda as a policy sees it: joints, rest pose, camera, periods and contract."""

from __future__ import annotations

import numpy as np

from tts_policy.control.conversions import seconds_to_ns
from tts_policy.policy.contract import ActionSpec, CameraSpec, ObservationSpec, PolicyContract

ARM_JOINTS = tuple(f'panda_joint{i}' for i in range(1, 8))
FINGER_JOINT = 'panda_finger_joint1'
MIRROR_JOINT = 'panda_finger_joint2'
COMMAND_JOINTS = (*ARM_JOINTS, FINGER_JOINT)
STATE_JOINTS = (*COMMAND_JOINTS, MIRROR_JOINT)
HOME_RAD = (0.0, np.pi / 16, 0.0, -np.pi / 2 - np.pi / 3, 0.0, np.pi - 0.2, np.pi / 4)
FINGER_OPEN_M = 0.04
CONTROL_PERIOD_S = 0.01
STATES_PER_FRAME = 5
FRAME_S = STATES_PER_FRAME * CONTROL_PERIOD_S
STEP_NS = seconds_to_ns(CONTROL_PERIOD_S)
FRAME_NS = STATES_PER_FRAME * STEP_NS
CAMERA_KEY = 'camera'
CAMERA_SIZE = 96

PANDA_CONTRACT = PolicyContract(
    ObservationSpec(
        cameras=(CameraSpec(CAMERA_KEY, CAMERA_SIZE, CAMERA_SIZE),),
        joints=COMMAND_JOINTS,
        steps=2,
        period_s=FRAME_S,
    ),
    ActionSpec(joints=COMMAND_JOINTS, horizon=16, execute=8, offset_steps=1),
)
