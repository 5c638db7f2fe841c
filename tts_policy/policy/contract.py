# SPDX-License-Identifier: Apache-2.0
"""The contract between a robot and a policy: what the policy observes and what it commands.

Everything here is plain data and needs no torch. The robot side takes joint names, image sizes
and the control period from it; the model side takes dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, Strict, StringConstraints, model_validator
from typing_extensions import Self

from tts_policy.policy.validation import WRITTEN_IF_SET, Flag, Integer, Mismatch, Spec, checked
from tts_policy.policy.yaml_file import read_yaml

# Lies beside recordings and says what a policy that is trained on them sees and commands.
CONTRACT_FILE = 'contract.yaml'


def _distinct(names: Sequence[str]) -> Sequence[str]:
    if len(set(names)) != len(names):
        raise ValueError('names that differ')
    return names


_Count = Annotated[Integer, Field(ge=1, le=1024)]
_Pixels = Annotated[Integer, Field(ge=16, le=2048)]
_Name = Annotated[str, Strict(), StringConstraints(min_length=1)]
_Joints = Annotated[tuple[_Name, ...], Field(min_length=1), AfterValidator(_distinct)]


@checked('camera')
class CameraSpec(Spec):
    """One camera: `key` names it in the window; images are uint8 RGB [height, width, 3]."""

    key: _Name
    height: _Pixels
    width: _Pixels


@checked('observation')
class ObservationSpec(Spec):
    """An observation window of `steps` samples, `period_s` seconds apart, newest last."""

    cameras: tuple[CameraSpec, ...]
    joints: _Joints
    steps: _Count
    period_s: Annotated[float, Strict(), Field(ge=0.001, le=10.0)]

    @model_validator(mode='after')
    def _check_cameras(self) -> Self:
        keys = [camera.key for camera in self.cameras]
        if len(set(keys)) != len(keys):
            raise Mismatch('cameras', 'keys that differ', str(keys))
        if 'joints' in keys:
            raise Mismatch('cameras', "another key than 'joints', which is taken", "'joints'")
        return self


@checked('action')
class ActionSpec(Spec):
    """A chunk of absolute joint set-points.

    Index 0 of the horizon belongs to the oldest observation of the window or, with
    `starts_at_newest`, to the newest. Set-point a, counted from the newest observation, is due at
    observation time + (a + offset_steps) * period_s.
    """

    joints: _Joints
    horizon: _Count
    execute: _Count
    offset_steps: Annotated[Integer, Field(ge=0, le=1)]
    starts_at_newest: Annotated[Flag, WRITTEN_IF_SET] = False


@checked()
class PolicyContract(Spec):
    """Observation and action contract of one policy."""

    observation: ObservationSpec
    action: ActionSpec

    @model_validator(mode='after')
    def _check_execute(self) -> Self:
        if self.action.execute > self.usable_actions:
            counted = 'horizon' if self.action.starts_at_newest else 'horizon - steps + 1'
            raise Mismatch(
                'action.execute',
                f'at most {counted} = {self.usable_actions}',
                str(self.action.execute),
            )
        return self

    @property
    def newest_action(self) -> int:
        """Index of the horizon that belongs to the newest observation."""
        return 0 if self.action.starts_at_newest else self.observation.steps - 1

    @property
    def usable_actions(self) -> int:
        """Set-points of a chunk from the newest observation on."""
        return self.action.horizon - self.newest_action

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Contract from a mapping, of which other keys are left to others, as in model.yaml.

        Raises
        ------
        Mismatch
            naming the field that is missing, unknown or out of range.

        """
        if isinstance(data, dict):
            data = {key: data[key] for key in ('observation', 'action') if key in data}
        return super().from_dict(data)


def read_contract(path: Path) -> PolicyContract:
    """Contract in a YAML file with `observation` and `action`, such as a bundle's model.yaml.

    Raises
    ------
    ValueError
        naming the file, if it cannot be read or holds no contract.

    """
    try:
        return PolicyContract.from_dict(read_yaml(path))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f'{path}: {" ".join(str(error).split())}') from None


def write_contract(path: Path, contract: PolicyContract) -> None:
    """Write a YAML file that `read_contract` reads."""
    path.write_text(yaml.safe_dump(contract.to_dict(), sort_keys=False))


@dataclass(frozen=True)
class CommittedActions:
    """Actions the robot will have executed before a new chunk arrives.

    actions: [n, A] in robot units, the first one due at the newest observation; weights: [n] in
    [0, 1], where 1 holds an action fixed and 0 leaves it free.
    """

    actions: NDArray[np.float64]
    weights: NDArray[np.float64]
