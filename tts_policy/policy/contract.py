# SPDX-License-Identifier: Apache-2.0
"""What a policy sees and what it commands: the contract between a robot and a model bundle.

Everything here is plain data. The ROS side reads joint names, image sizes and the period from it;
the model side reads dimensions. Neither knows the other.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray


class ContractError(ValueError):
    """A contract that cannot be met; the message names the field, what was expected and got."""


@dataclass(frozen=True)
class CameraSpec:
    """One camera: `key` names it in the window; images are uint8 RGB [height, width, 3]."""

    key: str
    height: int
    width: int


@dataclass(frozen=True)
class ObservationSpec:
    """An observation window of `steps` samples, `period_s` seconds apart, newest last."""

    cameras: tuple[CameraSpec, ...]
    joints: tuple[str, ...]
    steps: int
    period_s: float


@dataclass(frozen=True)
class ActionSpec:
    """A chunk of absolute joint set-points.

    Index 0 of the horizon belongs to the oldest observation of the window or, with
    `starts_at_newest`, to the newest. Set-point a, counted from the newest observation, is due at
    observation time + (a + offset_steps) * period_s.
    """

    joints: tuple[str, ...]
    horizon: int
    execute: int
    offset_steps: int
    starts_at_newest: bool = False


@dataclass(frozen=True)
class PolicyContract:
    """Observation and action contract of one policy."""

    observation: ObservationSpec
    action: ActionSpec

    def __post_init__(self) -> None:
        """Refuse a contract no robot could meet.

        Raises
        ------
        ContractError
            naming the field.

        """
        obs, act = self.observation, self.action
        for name, value in (
            ('observation.steps', obs.steps),
            ('action.horizon', act.horizon),
            ('action.execute', act.execute),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1024:
                raise ContractError(f'{name} must be an integer in [1, 1024], got {value!r}')
        if type(act.offset_steps) is not int or act.offset_steps not in (0, 1):
            raise ContractError(f'action.offset_steps must be 0 or 1, got {act.offset_steps!r}')
        if isinstance(obs.period_s, bool) or not 0.001 <= obs.period_s <= 10.0:
            raise ContractError(
                f'observation.period_s must be in [0.001, 10] s, got {obs.period_s!r}'
            )
        if not isinstance(act.starts_at_newest, bool):
            raise ContractError(
                f'action.starts_at_newest must be true or false, got {act.starts_at_newest!r}'
            )
        if act.execute > self.usable_actions:
            counted = 'horizon' if act.starts_at_newest else 'horizon - steps + 1'
            raise ContractError(
                f'action.execute must be at most {counted} = {self.usable_actions}, '
                f'got {act.execute}'
            )
        cameras = tuple(camera.key for camera in obs.cameras)
        for name, joints in (
            ('observation.joints', obs.joints),
            ('action.joints', act.joints),
            ('observation.cameras', cameras),
        ):
            given = all(isinstance(joint, str) and joint for joint in joints)
            if not given or not (joints or joints is cameras):
                raise ContractError(f'{name} must be a list of names, got {joints!r}')
            if len(set(joints)) != len(joints):
                raise ContractError(f'{name} must not repeat a name, got {list(joints)}')
        if 'joints' in cameras:
            raise ContractError("observation.cameras: the key 'joints' is taken, choose another")
        for camera in obs.cameras:
            sides = camera.height, camera.width
            if not all(type(side) is int and 16 <= side <= 2048 for side in sides):
                raise ContractError(
                    f'camera {camera.key!r} must be 16 to 2048 pixels a side, '
                    f'got {camera.height} x {camera.width}'
                )

    @property
    def newest_action(self) -> int:
        """Index of the horizon that belongs to the newest observation."""
        return 0 if self.action.starts_at_newest else self.observation.steps - 1

    @property
    def usable_actions(self) -> int:
        """Set-points of a chunk from the newest observation on."""
        return self.action.horizon - self.newest_action

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as they stand in model.yaml."""
        data = asdict(self)
        data['observation']['cameras'] = [asdict(camera) for camera in self.observation.cameras]
        data['observation']['joints'] = list(self.observation.joints)
        data['action']['joints'] = list(self.action.joints)
        if not self.action.starts_at_newest:
            del data['action']['starts_at_newest']
        return data

    @staticmethod
    def from_dict(data: dict[str, Any]) -> PolicyContract:
        """Inverse of `to_dict`.

        Raises
        ------
        ContractError
            for a missing or unknown field, or a value out of range.

        """
        try:
            obs = dict(data['observation'])
            obs['cameras'] = tuple(CameraSpec(**camera) for camera in obs['cameras'])
            obs['joints'] = tuple(obs['joints'])
            act = dict(data['action'])
            act['joints'] = tuple(act['joints'])
            return PolicyContract(ObservationSpec(**obs), ActionSpec(**act))
        except (KeyError, TypeError) as error:
            raise ContractError(f'observation/action contract is malformed: {error}') from error


def read_contract(path: Path) -> PolicyContract:
    """Contract in a YAML file with `observation` and `action`, such as a bundle's model.yaml.

    Raises
    ------
    ContractError
        naming the file, if it cannot be read or holds no contract.

    """
    try:
        return PolicyContract.from_dict(yaml.safe_load(path.read_text()))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ContractError(f'{path}: {" ".join(str(error).split())}') from None


@dataclass(frozen=True)
class CommittedActions:
    """Actions the robot will have executed before a new chunk arrives.

    actions: [n, A] in robot units, the first one due at the newest observation; weights: [n] in
    [0, 1], where 1 holds an action fixed and 0 leaves it free.
    """

    actions: NDArray[np.float64]
    weights: NDArray[np.float64]


def hold_weights(held: int, overlap: int, soft: bool) -> NDArray[np.float64]:
    """Weights [overlap] that hold the first `held` actions fixed; with `soft` the rest decay.

    The decay is equation 5 of Real-Time Chunking (arXiv 2506.07339): c (e^c - 1) / (e - 1), where
    c falls linearly from the last held action to the end of the overlap.
    """
    weights = np.zeros(overlap)
    weights[:held] = 1.0
    if soft and overlap > held:
        c = np.arange(overlap - held, 0, -1) / (overlap - held + 1)
        weights[held:] = c * np.expm1(c) / np.expm1(1.0)
    return weights
