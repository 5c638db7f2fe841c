# SPDX-License-Identifier: Apache-2.0
"""Scripted expert for Lift: joint set-points from the true state of the world.

The set-point is a function of the measured state only (arm pose, finger opening and speed, cube
pose): no phase counter, no clock. That makes it learnable from two camera frames and joint
positions, and it recovers by itself from any disturbance. Far away it steers along a funnel above
the cube, down its axis, closes, and lifts once the fingers are stopped by the cube.
"""

from __future__ import annotations

import mujoco
import numpy as np

from tts_policy.sim.lift import (
    ARM_JOINTS,
    COMMAND_JOINTS,
    FINGER_JOINT,
    FINGER_OPEN_M,
    HOME_RAD,
    LiftWorld,
)

FRAME_S = 0.05
REACH_S = 0.15  # how far ahead of the measured pose a set-point lies: servo lag + one frame
SPEED_M_S = 0.18
TURN_RAD_S = 1.2
HOVER_M = 0.07
FUNNEL_M = 0.035
LIFT_M = 0.13
CLOSING_STEP_M = 0.015
GRASP_DEPTH_M = -0.002


def _rotation_error(wanted: np.ndarray, current: np.ndarray) -> np.ndarray:
    """Rotation vector [3] in the world that turns matrix current [3, 3] into wanted [3, 3]."""
    quaternion, vector = np.zeros(4), np.zeros(3)
    mujoco.mju_mat2Quat(quaternion, (wanted @ current.T).ravel())
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector


class LiftExpert:
    """Set-points for the world it was made for; call `reset` with the world's reset."""

    def __init__(self, world: LiftWorld) -> None:
        """Use the world's model for inverse kinematics in a scratch copy of its data."""
        self._world = world
        self._model = world.model
        self._scratch = mujoco.MjData(world.model)
        self._jacobian = np.zeros((6, world.model.nv))
        self.reset()

    def reset(self) -> None:
        """Forget the last finger opening, from which the closing speed is told."""
        self._finger_before_m = FINGER_OPEN_M

    def set_points(self) -> dict[str, float]:
        """Set-points by joint name (rad, m) to be reached one frame (FRAME_S) from now."""
        world = self._world
        joints = world.joint_positions()
        finger = joints[FINGER_JOINT]
        arm = np.array([joints[name] for name in ARM_JOINTS])
        position, rotation = self._forward(arm)
        goal, wanted, finger_goal = self._goal(position, rotation, finger)
        self._finger_before_m = finger

        move = goal - position
        reach = SPEED_M_S * REACH_S
        move *= min(1.0, reach / max(float(np.linalg.norm(move)), 1e-9))
        turn = _rotation_error(wanted, rotation)
        turn *= min(1.0, TURN_RAD_S * REACH_S / max(float(np.linalg.norm(turn)), 1e-9))
        solution = self._inverse(arm, position + move, _rotated(rotation, turn))
        return dict(zip(COMMAND_JOINTS, (*solution.tolist(), finger_goal), strict=True))

    def _goal(
        self, position: np.ndarray, rotation: np.ndarray, finger: float
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Where the gripper should go now: position [3], rotation [3, 3], finger opening (m)."""
        cube = self._cube_position()
        wanted = self._grasp_rotation(rotation)
        grasp = cube + (0.0, 0.0, GRASP_DEPTH_M)
        aside = float(np.linalg.norm(position[:2] - cube[:2]))
        twist = float(np.linalg.norm(_rotation_error(wanted, rotation)))
        above = float(position[2] - grasp[2])
        around_cube = aside < 0.012 and abs(above) < 0.012 and twist < 0.15

        stopped = abs(finger - self._finger_before_m) < 0.0005
        if around_cube and finger < 0.026 and stopped:
            lift = np.array([position[0], position[1], self._world.cube_rest_height_m + LIFT_M])
            return lift, wanted, max(finger - CLOSING_STEP_M, 0.0)
        if around_cube:
            return grasp, wanted, max(finger - CLOSING_STEP_M, 0.0)
        # The funnel: the larger the error to the side or in yaw, the higher the goal.
        error = max(aside, 0.05 * twist)
        blend = min(max((error - 0.006) / FUNNEL_M, 0.0), 1.0)
        return grasp + (0.0, 0.0, HOVER_M * blend), wanted, FINGER_OPEN_M

    def _cube_position(self) -> np.ndarray:
        start = self._world.cube_qpos
        return self._world.data.qpos[start : start + 3].copy()

    def _grasp_rotation(self, rotation: np.ndarray) -> np.ndarray:
        """Gripper pointing down, fingers on the pair of cube faces that needs the least turn."""
        start = self._world.cube_qpos + 3
        w, x, y, z = self._world.data.qpos[start : start + 4]
        cube_yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
        yaw = np.arctan2(rotation[1, 0], rotation[0, 0])
        quarter = np.pi / 2
        yaw += (cube_yaw - yaw + quarter / 2) % quarter - quarter / 2
        c, s = np.cos(yaw), np.sin(yaw)
        return np.array([[c, s, 0.0], [s, -c, 0.0], [0.0, 0.0, -1.0]])

    def _forward(self, arm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scratch, site = self._scratch, self._world.grip_site
        scratch.qpos[self._world.arm_qpos] = arm
        mujoco.mj_kinematics(self._model, scratch)
        mujoco.mj_comPos(self._model, scratch)
        return scratch.site_xpos[site].copy(), scratch.site_xmat[site].reshape(3, 3).copy()

    def _inverse(self, arm: np.ndarray, position: np.ndarray, rotation: np.ndarray) -> np.ndarray:
        """Damped least squares from arm [7]; the redundant motion pulls towards the home pose."""
        limits = self._world.joint_limits_rad
        home = np.array(HOME_RAD)
        solution = arm.copy()
        for _ in range(8):
            now, turned = self._forward(solution)
            error = np.concatenate([position - now, _rotation_error(rotation, turned)])
            mujoco.mj_jacSite(
                self._model,
                self._scratch,
                self._jacobian[:3],
                self._jacobian[3:],
                self._world.grip_site,
            )
            jacobian = self._jacobian[:, self._world.arm_dof]
            inverse = jacobian.T @ np.linalg.inv(jacobian @ jacobian.T + 1e-4 * np.eye(6))
            posture = 0.05 * (home - solution)
            solution = solution + inverse @ error + posture - inverse @ (jacobian @ posture)
            solution = np.clip(solution, limits[:, 0] + 0.01, limits[:, 1] - 0.01)
        return solution


def _rotated(rotation: np.ndarray, turn: np.ndarray) -> np.ndarray:
    angle = float(np.linalg.norm(turn))
    if angle < 1e-9:
        return rotation
    quaternion, matrix = np.zeros(4), np.zeros(9)
    mujoco.mju_axisAngle2Quat(quaternion, turn / angle, angle)
    mujoco.mju_quat2Mat(matrix, quaternion)
    return matrix.reshape(3, 3) @ rotation
