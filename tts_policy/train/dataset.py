# SPDX-License-Identifier: Apache-2.0
"""Rosbag2 recordings to training windows.

One bag is one episode. Frames follow the header stamps of the first camera; every other stream
is sampled as the live node samples it: the newest message stamped no later than the frame. The
action of a frame is the commanded set-point `offset_steps` periods later. Windows are never
padded at the start of an episode, because the live node waits for a full window as well; past
the end the last action is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rosbags.highlevel import AnyReader
from rosbags.typesys import Stores, get_typestore
from torch import Tensor
from tqdm import tqdm

from tts_policy.core.contract import PolicyContract


class BagError(ValueError):
    """A recording that cannot become an episode; the message names the bag and the reason."""


@dataclass(frozen=True)
class Topics:
    """Topic of every stream of the contract."""

    cameras: dict[str, str]
    joints: str = '/joint_states'
    commands: str = '/joint_trajectory'


@dataclass(frozen=True)
class Episode:
    """One demonstration: images uint8 [F, H, W, 3] per camera, joints [F, J], actions [F, A]."""

    images: dict[str, NDArray[np.uint8]]
    joints: NDArray[np.float64]
    actions: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.joints)


def _stamp_ns(header: Any) -> int:
    stamp = header.stamp
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


def _newest_not_after(stamps: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Index of the newest stamp <= each target; -1 where there is none."""
    return np.searchsorted(stamps, targets, side='right') - 1


def _by_name(names: Sequence[str], wanted: Sequence[str], what: str) -> list[int]:
    missing = [name for name in wanted if name not in names]
    if missing:
        raise BagError(f'{what}: joints {missing} expected, got {list(names)}')
    return [list(names).index(name) for name in wanted]


class _Streams:
    """Messages of one bag, decoded and sorted by header stamp."""

    def __init__(self, path: Path, contract: PolicyContract, topics: Topics) -> None:
        self.images: dict[str, list[tuple[int, NDArray[np.uint8]]]] = {
            key: [] for key in topics.cameras
        }
        self.joints: list[tuple[int, NDArray[np.float64]]] = []
        # (header stamp, due times, set-points) of every command
        self.commands: list[tuple[int, NDArray[np.int64], NDArray[np.float64]]] = []
        camera_of = {topic: key for key, topic in topics.cameras.items()}
        wanted = {*camera_of, topics.joints, topics.commands}
        with AnyReader([path], default_typestore=get_typestore(Stores.ROS2_JAZZY)) as reader:
            connections = [c for c in reader.connections if c.topic in wanted]
            absent = wanted - {c.topic for c in connections}
            if absent:
                raise BagError(
                    f'{path}: topics {sorted(absent)} expected, got {sorted(reader.topics)}'
                )
            for connection, _, raw in reader.messages(connections):
                message: Any = reader.deserialize(raw, connection.msgtype)
                if connection.topic in camera_of:
                    self._add_image(camera_of[connection.topic], message, contract, path)
                elif connection.topic == topics.joints:
                    order = _by_name(message.name, contract.observation.joints, str(path))
                    self.joints.append((_stamp_ns(message.header), message.position[order]))
                else:
                    self._add_command(message, contract, path)
        streams: list[list[Any]] = [*self.images.values(), self.joints, self.commands]
        for stream in streams:
            if not stream:
                raise BagError(f'{path}: every topic of {sorted(wanted)} needs messages')
            stream.sort(key=itemgetter(0))

    def _add_image(self, key: str, message: Any, contract: PolicyContract, path: Path) -> None:
        camera = next(c for c in contract.observation.cameras if c.key == key)
        encoding, shape = message.encoding, (message.height, message.width)
        if encoding != 'rgb8' or shape != (camera.height, camera.width):
            raise BagError(
                f'{path}: camera {key!r} expected rgb8 {camera.height}x{camera.width}, '
                f'got {encoding} {shape[0]}x{shape[1]}'
            )
        rows = np.asarray(message.data, np.uint8).reshape(shape[0], message.step)
        image = rows[:, : 3 * shape[1]].reshape(*shape, 3)
        self.images[key].append((_stamp_ns(message.header), image))

    def _add_command(self, message: Any, contract: PolicyContract, path: Path) -> None:
        order = _by_name(message.joint_names, contract.action.joints, str(path))
        start = _stamp_ns(message.header)
        points = message.points
        due = [p.time_from_start.sec * 1_000_000_000 + p.time_from_start.nanosec for p in points]
        positions = np.stack([np.asarray(p.positions)[order] for p in points])
        self.commands.append((start, start + np.asarray(due, np.int64), positions))


def read_episode(path: Path, contract: PolicyContract, topics: Topics) -> Episode:
    """Read one bag.

    Raises
    ------
    BagError
        if a topic, joint or image does not meet the contract, or values are not finite.

    """
    streams = _Streams(path, contract, topics)
    period = round(contract.observation.period_s * 1e9)
    first_camera = contract.observation.cameras[0].key
    frames = np.array([stamp for stamp, _ in streams.images[first_camera]], np.int64)
    joint_stamps = np.array([stamp for stamp, _ in streams.joints], np.int64)
    command_stamps = np.array([stamp for stamp, _, _ in streams.commands], np.int64)
    # A frame needs a joint state and a command; before the first of them nothing can be learnt.
    frames = frames[frames >= max(joint_stamps[0], command_stamps[0])]
    if len(frames) < contract.observation.steps:
        raise BagError(
            f'{path}: {len(frames)} usable frames, expected at least {contract.observation.steps}'
        )
    if np.abs(np.diff(frames) - period).max(initial=0) > period // 2:
        raise BagError(
            f'{path}: camera period must stay within half of {period / 1e9} s, '
            f'got gaps up to {np.diff(frames).max() / 1e9} s'
        )
    images = {}
    for key, stream in streams.images.items():
        index = _newest_not_after(np.array([s for s, _ in stream], np.int64), frames)
        if index.min() < 0:
            raise BagError(f'{path}: camera {key!r} starts later than {first_camera!r}')
        images[key] = np.stack([stream[i][1] for i in index])
    joints = np.stack([streams.joints[i][1] for i in _newest_not_after(joint_stamps, frames)])
    actions = []
    for stamp, i in zip(frames, _newest_not_after(command_stamps, frames), strict=True):
        _, due, positions = streams.commands[i]
        target = stamp + contract.action.offset_steps * period
        actions.append([np.interp(target, due, column) for column in positions.T])
    episode = Episode(images, joints.astype(np.float64), np.array(actions, np.float64))
    if not (np.isfinite(episode.joints).all() and np.isfinite(episode.actions).all()):
        raise BagError(f'{path}: joint states and commands must be finite')
    return episode


def find_bags(paths: Sequence[Path]) -> list[Path]:
    """Bags among `paths` and one folder below each, sorted; raises BagError if there is none."""
    found = []
    for path in paths:
        candidates = [path, *sorted(path.iterdir())] if path.is_dir() else [path]
        found += [c for c in candidates if (c / 'metadata.yaml').is_file() or c.suffix == '.mcap']
    if not found:
        raise BagError(f'no rosbag2 recording in {[str(path) for path in paths]}')
    return found


class Windows:
    """Training windows over episodes, held in memory and gathered by index.

    Every window is a frame `t` of an episode, t >= To - 1: observations t - To + 1 .. t and
    actions t - To + 1 .. t - To + T.
    """

    def __init__(self, episodes: Sequence[Episode], contract: PolicyContract) -> None:
        self.contract = contract
        steps, horizon = contract.observation.steps, contract.action.horizon
        self.images = {
            camera.key: torch.from_numpy(np.concatenate([e.images[camera.key] for e in episodes]))
            for camera in contract.observation.cameras
        }
        self.joints = torch.from_numpy(np.concatenate([e.joints for e in episodes])).float()
        self.actions = torch.from_numpy(np.concatenate([e.actions for e in episodes])).float()
        self.episode_windows: list[Tensor] = []
        observation_index, action_index = [], []
        start = windows = 0
        for episode in episodes:
            frames = torch.arange(steps - 1, len(episode))
            window_start = frames[:, None] - (steps - 1)
            observation_index.append(start + window_start + torch.arange(steps))
            wanted = window_start + torch.arange(horizon)
            action_index.append(start + wanted.clamp(max=len(episode) - 1))
            self.episode_windows.append(torch.arange(windows, windows + len(frames)))
            start += len(episode)
            windows += len(frames)
        self.observation_index = torch.cat(observation_index)
        self.action_index = torch.cat(action_index)

    def __len__(self) -> int:
        return len(self.observation_index)

    def gather(self, index: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Images uint8 [B, To, H, W, 3] per camera, joints [B, To, J] and actions [B, T, A]."""
        observed = self.observation_index[index]
        images = {key: value[observed] for key, value in self.images.items()}
        return images, self.joints[observed], self.actions[self.action_index[index]]


def load_windows(
    bags: Sequence[Path], contract: PolicyContract, topics: Topics, progress: bool = True
) -> Windows:
    """Read every bag into one set of windows; raises BagError naming the first bad one."""
    bar = tqdm(bags, desc='reading bags', unit='bag', disable=not progress)
    return Windows([read_episode(bag, contract, topics) for bag in bar], contract)
