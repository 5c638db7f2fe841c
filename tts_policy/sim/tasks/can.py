# SPDX-License-Identifier: Apache-2.0
"""robosuite's PickPlaceCan: a can is to be carried from one bin into its corner of another."""

from __future__ import annotations

from typing import Any

import numpy as np

from tts_policy.sim.expert import Expert, Goal, Grasp, Gripper, nearest_turn, pointing_down
from tts_policy.sim.panda import FINGER_OPEN_M
from tts_policy.sim.task import PandaTask
from tts_policy.sim.world import HIDDEN_BODIES, HIDDEN_GROUP, CameraPose, World

START_CENTRE_M = (0.1, -0.25)
START_RANGE_M = (0.12, 0.17)
TARGET_LOW_M = (0.1, 0.28, 0.8)
TARGET_HIGH_M = (0.295, 0.525, 0.9)
RELEASE_M = (0.155, 0.335)  # within the target, near enough for an upright gripper
REST_HEIGHT_M = 0.86
RIM_HEIGHT_M = 0.9
HALF_HEIGHT_M = 0.04
CLEAR_HEIGHT_M = RIM_HEIGHT_M + HALF_HEIGHT_M + 0.03
# robosuite's rule wants 1 - tanh(10 d) < 0.6 of the distance d from gripper to can.
LET_GO_M = float(np.arctanh(0.4)) / 10
GRASP_ABOVE_M = 0.01
RELEASED_M = 0.035
MOUNT_PARTS = ('controller_box', 'pedestal_feet', 'torso', 'pedestal')
LEGS = tuple(f'bin{bin}_leg{leg}_visual' for bin in (1, 2) for leg in (1, 2, 3, 4))


class CanWorld(World):
    """The can stands anywhere in the first bin that robosuite's sampler reaches."""

    camera = CameraPose((0.1, -0.12, 0.85), 0.95, 130.0, -55.0)
    hidden_bodies = (*HIDDEN_BODIES, *(f'fixed_mount0_{part}' for part in MOUNT_PARTS))

    def _environment(self) -> Any:
        from robosuite.environments.manipulation.pick_place import PickPlace
        from robosuite.models.objects import CanObject

        class PickPlaceOneCan(PickPlace):
            """The other objects and the ghosts in the target would only cost time."""

            def _construct_objects(self) -> None:
                self.objects = [CanObject(name='Can')]

            def _construct_visual_objects(self) -> None:
                self.visual_objects: list[Any] = []

        return PickPlaceOneCan

    def _bind(self) -> None:
        super()._bind()
        self.can = self.object_start('Can_joint0')

    def _prepare_looks(self) -> None:
        super()._prepare_looks()
        self.model.geom_group[[self.model.geom(leg).id for leg in LEGS]] = HIDDEN_GROUP

    def _place(self, rng: np.random.Generator) -> None:
        x, y = np.array(START_CENTRE_M) + rng.uniform(-1, 1, 2) * START_RANGE_M
        self.place_upright(self.can, (x, y, REST_HEIGHT_M), rng.uniform(-np.pi, np.pi))

    def delivered(self) -> bool:
        """Whether the can is in its corner of the second bin."""
        can = self.position(self.can)
        return bool((can > TARGET_LOW_M).all() and (can < TARGET_HIGH_M).all())

    def success(self) -> bool:
        """robosuite's rule: the can is in its corner of the second bin and the gripper is not."""
        away = np.linalg.norm(self.grip_position() - self.position(self.can))
        return self.delivered() and bool(away > LET_GO_M)


class CanExpert(Expert):
    """Grasps the can from above, carries it over both rims and drops it into its corner."""

    speed_m_s = 0.3

    def __init__(self, world: CanWorld) -> None:
        self._world = world
        super().__init__(world)

    def _goal(self, gripper: Gripper) -> Goal:
        world = self._world
        can = world.position(world.can)
        rotation = pointing_down(nearest_turn(gripper.yaw, np.pi / 2, np.pi))
        grasp = Grasp(can + (0.0, 0.0, GRASP_ABOVE_M), rotation, held_below_m=0.030, hover_m=0.1)
        aside = float(np.linalg.norm(can[:2] - RELEASE_M))
        low = can[2] < RIM_HEIGHT_M + 0.01
        if (aside < 0.03 and low) or world.delivered():
            rising = 0.0 if gripper.finger < RELEASED_M else 0.15
            return Goal(gripper.position + (0.0, 0.0, rising), rotation, FINGER_OPEN_M)
        if not grasp.held(gripper):
            return grasp.approach(gripper)
        target = np.array([*RELEASE_M, CLEAR_HEIGHT_M + 0.02])
        if aside < 0.015:
            target[2] = RIM_HEIGHT_M - 0.01
        elif can[2] < CLEAR_HEIGHT_M:
            target[:2] = can[:2]
        return Goal(gripper.position + target - can, rotation, gripper.closing)


TASK = PandaTask('can', CanWorld, CanExpert, frame_limit=240)
