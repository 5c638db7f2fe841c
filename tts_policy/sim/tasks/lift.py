# SPDX-License-Identifier: Apache-2.0
"""robosuite's Lift: a red cube on a table is to be lifted."""

from __future__ import annotations

from typing import Any

import numpy as np

from tts_policy.sim.expert import Expert, Goal, Grasp, Gripper, nearest_turn, pointing_down
from tts_policy.sim.task import PandaTask
from tts_policy.sim.world import CameraPose, World

CUBE_RANGE_M = 0.10
TABLE_HEIGHT_M = 0.8
SUCCESS_HEIGHT_M = 0.04
LIFT_M = 0.13
GRASP_DEPTH_M = -0.002


class LiftWorld(World):
    """The cube lies within +-CUBE_RANGE_M in x and y, turned by any angle."""

    camera = CameraPose((-0.005, 0.0, 0.85), 0.47, 163.0, -45.0)

    def _environment(self) -> Any:
        from robosuite.environments.manipulation.lift import Lift

        return Lift

    def _bind(self) -> None:
        super()._bind()
        self.cube_qpos = self.object_start('cube_joint0')
        self.cube_rest_height_m = TABLE_HEIGHT_M + float(self.model.geom('cube_g0').size[2])

    def _place(self, rng: np.random.Generator) -> None:
        x, y = rng.uniform(-CUBE_RANGE_M, CUBE_RANGE_M, 2)
        yaw = rng.uniform(-np.pi, np.pi)
        self.place_upright(self.cube_qpos, (x, y, self.cube_rest_height_m), yaw)

    def success(self) -> bool:
        """robosuite's rule: the cube's centre is more than 4 cm above the table."""
        return bool(self.data.qpos[self.cube_qpos + 2] > TABLE_HEIGHT_M + SUCCESS_HEIGHT_M)


class LiftExpert(Expert):
    """Grasps the cube at the pair of faces that needs the least turn, and lifts it."""

    def __init__(self, world: LiftWorld) -> None:
        self._world = world
        super().__init__(world)

    def _goal(self, gripper: Gripper) -> Goal:
        world = self._world
        cube = world.position(world.cube_qpos)
        yaw = nearest_turn(gripper.yaw, world.yaw(world.cube_qpos), np.pi / 2)
        rotation = pointing_down(yaw)
        grasp = Grasp(cube + (0.0, 0.0, GRASP_DEPTH_M), rotation, held_below_m=0.026)
        if not grasp.held(gripper):
            return grasp.approach(gripper)
        x, y, _ = gripper.position
        lifted = np.array([x, y, world.cube_rest_height_m + LIFT_M])
        return Goal(lifted, rotation, gripper.closing)


TASK = PandaTask('lift', LiftWorld, LiftExpert, frame_limit=120)
