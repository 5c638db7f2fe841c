# SPDX-License-Identifier: Apache-2.0
"""A simulated Panda in one of robosuite's tasks, without ROS: the loop around robosuite's model.

The model (arm, gripper, arena, objects, actuators) is robosuite's; only the loop around it is
ours: `World.step` advances CONTROL_PERIOD_S with joint position set-points, the way robosuite's
absolute JOINT_POSITION controller does (M(q) (kp e - kd qd) + bias at every physics step), and the
finger set-point goes straight to the gripper's position actuators. A task is a subclass, which
says what lies in the scene, where, when it is done, and from where the camera looks.

Invariants: the world after `reset(seed)` followed by the same set-points is bitwise the same on
every run of one machine; `render` never changes the state of the world.
"""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import mujoco
import numpy as np
from numpy.typing import NDArray

from tts_policy.sim.panda import (
    ARM_JOINTS,
    CAMERA_SIZE,
    COMMAND_JOINTS,
    CONTROL_PERIOD_S,
    FINGER_JOINT,
    FINGER_OPEN_M,
    HOME_RAD,
    STATE_JOINTS,
)

SETTLE_S = 0.1
STIFFNESS = 400.0
MODEL_SEED = 0
HIDDEN_GROUP = 5
# Mount, lower arm and room: out of sight, or dear to draw.
HIDDEN_BODIES = ('fixed_mount0_base', *(f'robot0_link{i}' for i in range(5)), 'world')


@dataclass(frozen=True)
class CameraPose:
    """Where the fixed camera stands: lookat [m], distance [m], azimuth and elevation [deg]."""

    lookat: tuple[float, float, float]
    distance: float
    azimuth: float
    elevation: float


class World(ABC):
    """One world.

    `model` and `data` are MuJoCo's, for the scripted expert and for tests; the robot's interface
    is `reset`, `step`, `joint_positions`, `success` and `render`.
    """

    camera: ClassVar[CameraPose]
    hidden_bodies: ClassVar[tuple[str, ...]] = HIDDEN_BODIES

    def __init__(self) -> None:
        """Build the world, reset with seed 0. Raises ImportError without robosuite."""
        self.model = self._compile()
        self.data = mujoco.MjData(self.model)
        self._bind()
        self._prepare_looks()
        self._renderer: mujoco.Renderer | None = None
        self.reset(0)

    def _compile(self) -> mujoco.MjModel:
        # robosuite sets its level at import; its hints about optional parts are not for our users.
        hints = logging.getLogger('robosuite_logs')
        hints.addFilter(lambda record: record.levelno >= logging.ERROR)
        environment = self._environment()(
            robots='Panda',
            has_renderer=False,
            has_offscreen_renderer=False,
            use_camera_obs=False,
            use_object_obs=False,
            seed=MODEL_SEED,
        )
        return environment.sim.model._model

    @abstractmethod
    def _environment(self) -> Any:
        """Class of robosuite's environment, of which only the model is used."""

    @abstractmethod
    def _place(self, rng: np.random.Generator) -> None:
        """Put the objects where `rng` says; the arm is placed afterwards."""

    @abstractmethod
    def success(self) -> bool:
        """Whether the task is done, by robosuite's rule."""

    def _bind(self) -> None:
        model = self.model
        arm = [model.joint(f'robot0_joint{i}') for i in range(1, 8)]
        self.arm_qpos = np.array([j.qposadr[0] for j in arm])
        self.arm_dof = np.array([j.dofadr[0] for j in arm])
        self._arm_inertia = np.ix_(self.arm_dof, self.arm_dof)
        self._arm_ctrl = np.array([model.actuator(f'robot0_torq_j{i}').id for i in range(1, 8)])
        self._torque_limit = model.actuator_ctrlrange[self._arm_ctrl, 1].copy()
        fingers = [model.joint(f'gripper0_right_finger_joint{i}') for i in (1, 2)]
        self._finger_qpos = np.array([j.qposadr[0] for j in fingers])
        self._finger_ctrl = np.array(
            [model.actuator(f'gripper0_right_gripper_finger_joint{i}').id for i in (1, 2)]
        )
        self.grip_site = model.site('gripper0_right_grip_site').id
        self._substeps = round(CONTROL_PERIOD_S / model.opt.timestep)
        self._inertia = np.zeros((model.nv, model.nv))
        self.joint_limits_rad = model.jnt_range[[j.id for j in arm]].copy()

    def _prepare_looks(self) -> None:
        """Leave what the camera cannot see, and what costs time to draw, out of the picture."""
        model = self.model
        model.vis.quality.offsamples = 0
        model.site_rgba[:, 3] = 0.0
        for name in self.hidden_bodies:
            geoms = np.flatnonzero(model.geom_bodyid == model.body(name).id)
            model.geom_group[geoms[model.geom_group[geoms] == 1]] = HIDDEN_GROUP

    def reset(self, seed: int, start_jitter_rad: float = 0.0) -> None:
        """Place the objects by `seed` and put the arm at rest in its home pose, gripper open.

        start_jitter_rad is the standard deviation of a random offset of the arm joints.
        """
        rng = np.random.default_rng(seed)
        mujoco.mj_resetData(self.model, self.data)
        self._place(rng)
        home = np.array(HOME_RAD) + start_jitter_rad * rng.standard_normal(7)
        self.data.qpos[self.arm_qpos] = home
        self.data.qpos[self._finger_qpos] = (FINGER_OPEN_M, -FINGER_OPEN_M)
        mujoco.mj_forward(self.model, self.data)
        rest = dict(zip(COMMAND_JOINTS, (*home.tolist(), FINGER_OPEN_M), strict=True))
        for _ in range(round(SETTLE_S / CONTROL_PERIOD_S)):
            self.step(rest)

    def step(self, set_points: Mapping[str, float]) -> None:
        """Advance CONTROL_PERIOD_S; set_points names all of COMMAND_JOINTS (rad, finger m)."""
        target = np.array([set_points[name] for name in ARM_JOINTS])
        finger = min(max(set_points[FINGER_JOINT], 0.0), FINGER_OPEN_M)
        model, data = self.model, self.data
        data.ctrl[self._finger_ctrl] = (finger, -finger)
        damping = 2.0 * np.sqrt(STIFFNESS)
        for _ in range(self._substeps):
            mujoco.mj_step1(model, data)
            mujoco.mj_fullM(model, self._inertia, data.qM)
            error = target - data.qpos[self.arm_qpos]
            wanted = STIFFNESS * error - damping * data.qvel[self.arm_dof]
            torque = self._inertia[self._arm_inertia] @ wanted
            torque += data.qfrc_bias[self.arm_dof]
            data.ctrl[self._arm_ctrl] = np.clip(torque, -self._torque_limit, self._torque_limit)
            mujoco.mj_step2(model, data)

    def joint_positions(self) -> dict[str, float]:
        """Positions by name of STATE_JOINTS: 7 arm joints in rad, 2 finger openings in m."""
        fingers = np.abs(self.data.qpos[self._finger_qpos])
        values = (*self.data.qpos[self.arm_qpos].tolist(), *fingers.tolist())
        return dict(zip(STATE_JOINTS, values, strict=True))

    def object_start(self, joint: str) -> int:
        """First of the seven entries of an object's pose (position [m], quaternion) in qpos."""
        return int(self.model.joint(joint).qposadr[0])

    def position(self, start: int) -> NDArray[np.float64]:
        """Position [3] of the object whose pose begins at `start` of qpos."""
        return self.data.qpos[start : start + 3].copy()

    def yaw(self, start: int) -> float:
        """Rotation about the vertical [rad] of the object whose pose begins at `start`."""
        w, x, y, z = self.data.qpos[start + 3 : start + 7]
        return float(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)))

    def place_upright(self, start: int, position: tuple[float, float, float], yaw: float) -> None:
        """Set the pose of an object that stands on its base."""
        pose = [*position, np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)]
        self.data.qpos[start : start + 7] = pose

    def grip_position(self) -> NDArray[np.float64]:
        """Point between the finger tips [3]."""
        mujoco.mj_kinematics(self.model, self.data)
        return self.data.site_xpos[self.grip_site].copy()

    def render(self) -> np.ndarray:
        """Return what the fixed camera sees: uint8 [96, 96, 3] RGB, a new array every call."""
        if self._renderer is None:
            self._renderer = mujoco.Renderer(self.model, CAMERA_SIZE, CAMERA_SIZE)
            self._camera = _free_camera(self.camera)
            flags = self._renderer.scene.flags
            for flag in ('SHADOW', 'REFLECTION', 'SKYBOX', 'HAZE'):
                flags[getattr(mujoco.mjtRndFlag, f'mjRND_{flag}')] = 0
            self._options = mujoco.MjvOption()
            self._options.geomgroup[:] = (0, 1, 0, 0, 0, 0)
        mujoco.mj_kinematics(self.model, self.data)
        self._renderer.update_scene(self.data, self._camera, self._options)
        return self._renderer.render().copy()

    def close(self) -> None:
        """Free the renderer; the world can be used on and makes a new one when asked."""
        if self._renderer is not None:
            # MuJoCo frees its objects in whatever context is current: draw once, so that it is
            # this one and not that of another world.
            self._renderer.render()
            self._renderer.close()
            self._renderer = None

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(Exception):
            self.close()


def _free_camera(pose: CameraPose) -> mujoco.MjvCamera:
    camera = mujoco.MjvCamera()
    camera.type = mujoco.mjtCamera.mjCAMERA_FREE
    camera.lookat[:] = pose.lookat
    camera.distance = pose.distance
    camera.azimuth = pose.azimuth
    camera.elevation = pose.elevation
    return camera
