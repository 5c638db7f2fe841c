# SPDX-License-Identifier: Apache-2.0
"""Scripted experts: joint set-points from the true state of the world.

The set-point is a function of the measured state only (arm pose, finger opening and speed, object
poses): no phase counter, no clock. That makes it learnable from two camera frames and joint
positions, and it recovers by itself from any disturbance. Far from an object an expert steers
along a funnel above it, down its axis, and closes the fingers until the object stops them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import mujoco
import numpy as np
from numpy.typing import NDArray

from tts_policy.sim.panda import (
    ARM_JOINTS,
    COMMAND_JOINTS,
    FINGER_JOINT,
    FINGER_OPEN_M,
    HOME_RAD,
)
from tts_policy.sim.world import World

REACH_S = 0.15  # how far ahead of the measured pose a set-point lies: servo lag + one frame
SPEED_M_S = 0.18
TURN_RAD_S = 1.2
HOVER_M = 0.07
FUNNEL_M = 0.035
CLOSING_STEP_M = 0.015


@dataclass(frozen=True)
class Gripper:
    """Measured pose of the gripper: position [3], rotation [3, 3], opening of one finger [m].

    stopped: the fingers have not moved since the last frame.
    """

    position: NDArray[np.float64]
    rotation: NDArray[np.float64]
    finger: float
    stopped: bool

    @property
    def yaw(self) -> float:
        """Direction in which the fingers open [rad]."""
        return float(np.arctan2(self.rotation[1, 0], self.rotation[0, 0]))

    @property
    def closing(self) -> float:
        """Finger set-point that closes, or presses once something is between the fingers."""
        return max(self.finger - CLOSING_STEP_M, 0.0)


@dataclass(frozen=True)
class Goal:
    """Where the gripper should go now: position [3], rotation [3, 3], opening of one finger."""

    position: NDArray[np.float64]
    rotation: NDArray[np.float64]
    finger: float


@dataclass(frozen=True)
class Grasp:
    """A way to hold an object: gripper pose, and the finger opening that says it is held."""

    position: NDArray[np.float64]
    rotation: NDArray[np.float64]
    held_below_m: float
    hover_m: float = HOVER_M

    def errors(self, gripper: Gripper) -> tuple[float, float]:
        """Distance to the side [m] and twist [rad] of the gripper from the grasp."""
        aside = float(np.linalg.norm(gripper.position[:2] - self.position[:2]))
        return aside, float(np.linalg.norm(rotation_error(self.rotation, gripper.rotation)))

    def around(self, gripper: Gripper) -> bool:
        """Whether the object is between the fingers."""
        aside, twist = self.errors(gripper)
        above = float(gripper.position[2] - self.position[2])
        return aside < 0.012 and abs(above) < 0.012 and twist < 0.15

    def held(self, gripper: Gripper) -> bool:
        """Whether the fingers were stopped by the object."""
        return self.around(gripper) and gripper.finger < self.held_below_m and gripper.stopped

    def approach(self, gripper: Gripper) -> Goal:
        """Close around the object, or get there through the funnel above it."""
        if self.around(gripper):
            return Goal(self.position, self.rotation, gripper.closing)
        # The funnel: the larger the error to the side or in yaw, the higher the goal.
        aside, twist = self.errors(gripper)
        error = max(aside, 0.05 * twist)
        blend = min(max((error - 0.006) / FUNNEL_M, 0.0), 1.0)
        above = self.position + (0.0, 0.0, self.hover_m * blend)
        return Goal(above, self.rotation, FINGER_OPEN_M)


def rotation_error(
    wanted: NDArray[np.float64], current: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Rotation vector [3] in the world that turns matrix current [3, 3] into wanted [3, 3]."""
    quaternion, vector = np.zeros(4), np.zeros(3)
    mujoco.mju_mat2Quat(quaternion, (wanted @ current.T).ravel())
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector


def pointing_down(yaw: float) -> NDArray[np.float64]:
    """Rotation [3, 3] of a gripper that points down, fingers opening along `yaw`."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, s, 0.0], [s, -c, 0.0], [0.0, 0.0, -1.0]])


def nearest_turn(yaw: float, target: float, symmetry: float) -> float:
    """Yaw closest to `yaw` among target + n * symmetry [rad]."""
    return yaw + ((target - yaw + symmetry / 2) % symmetry - symmetry / 2)


class Expert(ABC):
    """Set-points for the world it was made for; call `reset` with the world's reset."""

    speed_m_s: float = SPEED_M_S

    def __init__(self, world: World) -> None:
        """Use the world's model for inverse kinematics in a scratch copy of its data."""
        self._robot = world
        self._model = world.model
        self._scratch = mujoco.MjData(world.model)
        self._jacobian = np.zeros((6, world.model.nv))
        self.reset()

    @abstractmethod
    def _goal(self, gripper: Gripper) -> Goal:
        """Where the gripper should go now."""

    def reset(self) -> None:
        """Forget the last finger opening, from which the closing speed is told."""
        self._finger_before_m = FINGER_OPEN_M

    def set_points(self) -> dict[str, float]:
        """Set-points by joint name (rad, m) to be reached one frame (FRAME_S) from now."""
        joints = self._robot.joint_positions()
        finger = joints[FINGER_JOINT]
        arm = np.array([joints[name] for name in ARM_JOINTS])
        position, rotation = self._forward(arm)
        stopped = abs(finger - self._finger_before_m) < 0.0005
        goal = self._goal(Gripper(position, rotation, finger, stopped))
        self._finger_before_m = finger

        move = goal.position - position
        reach = self.speed_m_s * REACH_S
        move *= min(1.0, reach / max(float(np.linalg.norm(move)), 1e-9))
        turn = rotation_error(goal.rotation, rotation)
        turn *= min(1.0, TURN_RAD_S * REACH_S / max(float(np.linalg.norm(turn)), 1e-9))
        solution = self._inverse(arm, position + move, _rotated(rotation, turn))
        return dict(zip(COMMAND_JOINTS, (*solution.tolist(), goal.finger), strict=True))

    def _forward(
        self, arm: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        scratch, site = self._scratch, self._robot.grip_site
        scratch.qpos[self._robot.arm_qpos] = arm
        mujoco.mj_kinematics(self._model, scratch)
        mujoco.mj_comPos(self._model, scratch)
        return scratch.site_xpos[site].copy(), scratch.site_xmat[site].reshape(3, 3).copy()

    def _inverse(
        self,
        arm: NDArray[np.float64],
        position: NDArray[np.float64],
        rotation: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """Damped least squares from arm [7]; the redundant motion pulls towards the home pose."""
        limits = self._robot.joint_limits_rad
        home = np.array(HOME_RAD)
        solution = arm.copy()
        for _ in range(8):
            now, turned = self._forward(solution)
            error = np.concatenate([position - now, rotation_error(rotation, turned)])
            mujoco.mj_jacSite(
                self._model,
                self._scratch,
                self._jacobian[:3],
                self._jacobian[3:],
                self._robot.grip_site,
            )
            jacobian = self._jacobian[:, self._robot.arm_dof]
            inverse = jacobian.T @ np.linalg.inv(jacobian @ jacobian.T + 1e-4 * np.eye(6))
            posture = 0.05 * (home - solution)
            solution = solution + inverse @ error + posture - inverse @ (jacobian @ posture)
            solution = np.clip(solution, limits[:, 0] + 0.01, limits[:, 1] - 0.01)
        return solution


def _rotated(rotation: NDArray[np.float64], turn: NDArray[np.float64]) -> NDArray[np.float64]:
    angle = float(np.linalg.norm(turn))
    if angle < 1e-9:
        return rotation
    quaternion, matrix = np.zeros(4), np.zeros(9)
    mujoco.mju_axisAngle2Quat(quaternion, turn / angle, angle)
    mujoco.mju_quat2Mat(matrix, quaternion)
    return matrix.reshape(3, 3) @ rotation
