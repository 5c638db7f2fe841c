# SPDX-License-Identifier: Apache-2.0
"""A policy leads the arm astray, so that the expert can show the way back.

A policy trained on an expert's own episodes has never seen what its own small errors lead to: a
missed grasp, an object pushed aside. Here it runs an episode for a random number of frames and
leaves the world as it is; the expert, which needs no history, takes over and is recorded from
there (Ross et al. 2011, DAgger; Kelly et al. 2019, HG-DAgger, without the human).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tts_policy.policy.policy import TestTimeSparsePolicy
from tts_policy.sim.episode import Timeline
from tts_policy.sim.panda import FRAME_NS
from tts_policy.sim.rollout import run_episode
from tts_policy.sim.world import World

MIN_FRAMES = 8
LEAD_STREAM = 2  # keeps the length of a lead independent of objects and disturbances


@dataclass(frozen=True)
class PolicyLead:
    """Runs a policy at `sparsity` for MIN_FRAMES to max_frames frames of an episode."""

    policy: TestTimeSparsePolicy
    sparsity: float
    max_frames: int

    def __post_init__(self) -> None:
        """Raise ValueError for a lead that is too short to move the arm."""
        if self.max_frames < MIN_FRAMES:
            raise ValueError(f'lead: expected at least {MIN_FRAMES} frames, got {self.max_frames}')

    def frames(self, seed: int) -> int:
        """How long the policy leads in the episode of this seed."""
        rng = np.random.default_rng((LEAD_STREAM, seed))
        return int(rng.integers(MIN_FRAMES, self.max_frames + 1))

    def __call__(self, world: World, seed: int) -> bool:
        """Reset the world to `seed` and lead; return whether the policy has finished the task."""
        execute = self.policy.contract.action.execute
        timeline = Timeline(execute * FRAME_NS, self.frames(seed) * FRAME_NS)
        return run_episode(self.policy, world, seed, self.sparsity, timeline).success
