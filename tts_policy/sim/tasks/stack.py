# SPDX-License-Identifier: Apache-2.0
"""robosuite's Stack: a red cube is to be placed on a larger green one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tts_policy.sim.expert import (
    Expert,
    Goal,
    Grasp,
    Gripper,
    nearest_turn,
    pointing_down,
)
from tts_policy.sim.panda import FINGER_OPEN_M
from tts_policy.sim.task import PandaTask
from tts_policy.sim.world import CameraPose, World

RANGE_M = 0.08
TABLE_HEIGHT_M = 0.8
SUCCESS_HEIGHT_M = 0.04
CLEARANCE_M = 0.035
NARROW_M = 0.11  # cubes closer than this leave a finger no room between them
RELEASED_M = 0.032


class StackWorld(World):
    """Both cubes lie within +-RANGE_M in x and y, turned by any angle, and do not touch."""

    camera = CameraPose((-0.005, 0.0, 0.85), 0.47, 163.0, -45.0)

    def _environment(self) -> Any:
        from robosuite.environments.manipulation.stack import Stack

        return Stack

    def _bind(self) -> None:
        super()._bind()
        model = self.model
        self.red, self.green = (self.object_start(f'cube{which}_joint0') for which in 'AB')
        self._red_geom, self._green_geom = (model.geom(f'cube{which}_g0').id for which in 'AB')
        self._red_half = float(model.geom_size[self._red_geom, 2])
        self._green_half = float(model.geom_size[self._green_geom, 2])
        self.stacked_height_m = self._red_half + self._green_half
        self._fingers = [
            np.flatnonzero(
                np.isin(
                    model.geom_bodyid,
                    [
                        model.body(f'gripper0_right_{side}finger').id,
                        model.body(f'gripper0_right_finger_joint{number}_tip').id,
                    ],
                )
            )
            for number, side in enumerate(('left', 'right'), start=1)
        ]

    def _place(self, rng: np.random.Generator) -> None:
        # Circles around the cubes do not overlap, as robosuite's sampler demands.
        apart = np.sqrt(2) * self.stacked_height_m
        while True:
            red, green = rng.uniform(-RANGE_M, RANGE_M, (2, 2))
            if np.linalg.norm(red - green) > apart:
                break
        for start, (x, y), half in (
            (self.red, red, self._red_half),
            (self.green, green, self._green_half),
        ):
            self.place_upright(start, (x, y, TABLE_HEIGHT_M + half), rng.uniform(-np.pi, np.pi))

    def _touching(self, geom: int, others: NDArray[np.int64]) -> bool:
        pairs = self.data.contact.geom
        hit = np.isin(pairs[:, 0], others) & (pairs[:, 1] == geom)
        return bool((hit | np.isin(pairs[:, 1], others) & (pairs[:, 0] == geom)).any())

    def success(self) -> bool:
        """robosuite's rule: the red cube is lifted, touches the green one, and is let go."""
        lifted = self.data.qpos[self.red + 2] > TABLE_HEIGHT_M + SUCCESS_HEIGHT_M
        return bool(
            lifted
            and self._touching(self._red_geom, np.array([self._green_geom]))
            and not all(self._touching(self._red_geom, finger) for finger in self._fingers)
        )


class StackExpert(Expert):
    """Grasps the red cube, carries it over the green one, puts it down and withdraws."""

    def __init__(self, world: StackWorld) -> None:
        self._world = world
        super().__init__(world)

    def _goal(self, gripper: Gripper) -> Goal:
        world = self._world
        red, green = world.position(world.red), world.position(world.green)
        top = green + (0.0, 0.0, world.stacked_height_m)
        rotation = self._grasp_rotation(gripper, red, green)
        grasp = Grasp(red, rotation, held_below_m=0.026)
        aside = float(np.linalg.norm(red[:2] - top[:2]))
        if aside < 0.02 and abs(red[2] - top[2]) < 0.004:
            rising = 0.0 if gripper.finger < RELEASED_M else 0.1
            return Goal(gripper.position + (0.0, 0.0, rising), gripper.rotation, FINGER_OPEN_M)
        if grasp.held(gripper):
            target = self._carried(red, top, aside)
            return Goal(gripper.position + target - red, rotation, gripper.closing)
        return grasp.approach(gripper)

    def _carried(
        self, red: NDArray[np.float64], top: NDArray[np.float64], aside: float
    ) -> NDArray[np.float64]:
        """Where the red cube should go: straight up, over the green one, then down on it."""
        if aside > 0.012 and red[2] < top[2] + CLEARANCE_M / 2:
            return red + (0.0, 0.0, CLEARANCE_M)
        blend = min(max((aside - 0.003) / 0.01, 0.0), 1.0)
        return top + (0.0, 0.0, CLEARANCE_M * blend - 0.002)

    def _grasp_rotation(
        self, gripper: Gripper, red: NDArray[np.float64], green: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Fingers on the faces that need the least turn, or where the green cube leaves room."""
        yaw = self._world.yaw(self._world.red)
        x, y, z = green - red
        if abs(z) < 0.02 and np.hypot(x, y) < NARROW_M:
            yaw = nearest_turn(np.arctan2(y, x) + np.pi / 2, yaw, np.pi / 2)
            return pointing_down(nearest_turn(gripper.yaw, yaw, np.pi))
        return pointing_down(nearest_turn(gripper.yaw, yaw, np.pi / 2))


TASK = PandaTask('stack', StackWorld, StackExpert, frame_limit=240)
