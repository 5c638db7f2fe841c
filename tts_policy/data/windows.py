# SPDX-License-Identifier: Apache-2.0
"""Recordings to training windows, as the live node would have seen them.

A window is made at every period at which the node could tick; window and rhythm are those of the
node's own code. A recording is an episode, cut where the stamps have a gap or a topic says so.
Windows are never padded: where the node would have waited, there is none. Past the end of an
episode the last action is held. Without recorded commands the actions are the joint states that
followed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tts_policy.data.data_check import DataCheck
from tts_policy.data.reader import BagError
from tts_policy.data.replay import RecordedFuture, RecordedTick, RecordedTicks
from tts_policy.data.samples import SampleSource
from tts_policy.policy.contract import PolicyContract


@dataclass(frozen=True)
class Episode:
    """W windows of one demonstration.

    images: samples uint8 [F, H, W, 3] per camera, and image_index [W, To] which of them a window
    shows; joints [W, To, J]; actions [W, T, A], from the oldest observation on.
    """

    images: dict[str, NDArray[np.uint8]]
    image_index: dict[str, NDArray[np.int64]]
    joints: NDArray[np.float64]
    actions: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.joints)


class _ImageStore:
    """Images of one camera, each kept once though several windows show it."""

    def __init__(self, steps: int) -> None:
        self.images: list[NDArray[np.uint8]] = []
        self.index: list[list[int]] = []
        self._steps = steps

    def add(self, window: NDArray[np.uint8]) -> None:
        self.index.append([self._find(image) for image in window])

    def _find(self, image: NDArray[np.uint8]) -> int:
        for at in range(len(self.images) - 1, max(-1, len(self.images) - 1 - 2 * self._steps), -1):
            if np.array_equal(self.images[at], image):
                return at
        self.images.append(image.copy())
        return len(self.images) - 1


def state_lead_steps(contract: PolicyContract) -> int:
    """Periods by which a joint state stands in for the command of before, where none is recorded.

    A set-point due at once would be the very state that was observed, so it is at least one.
    """
    return max(1, contract.action.offset_steps)


def _held(actions: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Unknown rows at the end take the last known one; None if an earlier one is unknown."""
    known = ~np.isnan(actions).any(-1)
    count = int(known.argmin()) if not known.all() else len(known)
    if count == 0 or known[count:].any():
        return None
    return np.concatenate(
        [actions[:count], np.repeat(actions[count - 1 : count], len(actions) - count, 0)]
    )


def _episode(ticks: list[RecordedTick], contract: PolicyContract) -> Episode | None:
    stores = {c.key: _ImageStore(contract.observation.steps) for c in contract.observation.cameras}
    joints, actions = [], []
    for tick in ticks:
        action = _held(tick.future)
        if action is None:
            continue
        for key, store in stores.items():
            store.add(tick.scheduled.observation[key])
        joints.append(tick.scheduled.observation['joints'])
        actions.append(action)
    if not joints:
        return None
    return Episode(
        {key: np.stack(store.images) for key, store in stores.items()},
        {key: np.array(store.index, np.int64) for key, store in stores.items()},
        np.array(joints, np.float64),
        np.array(actions, np.float64),
    )


def read_episodes(samples: SampleSource, check: DataCheck | None = None) -> list[Episode]:
    """Read a recording, whose samples `check` sees as well.

    Raises
    ------
    BagError
        if a joint or image does not meet the contract, values are not finite, the recording is
        damaged or has no window.

    """
    if check is not None:
        check.begin(samples.name)
    contract = samples.contract
    lead = None if samples.has_commands else state_lead_steps(contract)
    future = RecordedFuture(contract, samples.has_commands, contract.newest_action, lead)
    period_ns = round(contract.observation.period_s * 1e9)
    observe = None if check is None else check.add
    recorded = RecordedTicks(samples, period_ns, future=future, observe=observe)
    by_episode = groupby(recorded, key=lambda tick: tick.scheduled.episode)
    episodes = [_episode(list(ticks), contract) for _, ticks in by_episode]
    for problem in samples.problems():
        raise BagError(problem)
    found = [episode for episode in episodes if episode is not None]
    if not found:
        reason = recorded.schedule.waiting_for or 'no action is known for any of them'
        raise BagError(f'{samples.name}: expected windows, got none: {reason}')
    return found


class Windows:
    """Training windows over episodes, held in memory and gathered by index.

    joints [N, J] and actions [M, A] are all there are, for statistics.
    """

    def __init__(self, episodes: Sequence[Episode], contract: PolicyContract) -> None:
        self.contract = contract
        self.images: dict[str, Tensor] = {}
        self._image_index: dict[str, Tensor] = {}
        for camera in contract.observation.cameras:
            images = [episode.images[camera.key] for episode in episodes]
            starts = np.cumsum([0, *(len(i) for i in images[:-1])])
            index = [e.image_index[camera.key] + s for e, s in zip(episodes, starts, strict=True)]
            self.images[camera.key] = torch.from_numpy(np.concatenate(images))
            self._image_index[camera.key] = torch.from_numpy(np.concatenate(index))
        self._joints = torch.from_numpy(np.concatenate([e.joints for e in episodes])).float()
        self._actions = torch.from_numpy(np.concatenate([e.actions for e in episodes])).float()
        self.joints, self.actions = self._joints.flatten(0, 1), self._actions.flatten(0, 1)
        ends = np.cumsum([len(episode) for episode in episodes]).tolist()
        self.episode_windows: list[Tensor] = [
            torch.arange(end - len(episode), end)
            for episode, end in zip(episodes, ends, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._joints)

    def gather(self, index: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Images uint8 [B, To, H, W, 3] per camera, joints [B, To, J] and actions [B, T, A]."""
        images = {key: value[self._image_index[key][index]] for key, value in self.images.items()}
        return images, self._joints[index], self._actions[index]
