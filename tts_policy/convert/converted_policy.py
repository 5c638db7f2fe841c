# SPDX-License-Identifier: Apache-2.0
"""A converted policy: what every reader returns, and a draft of its node's parameter file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from tts_policy.convert.restricted_pickle import CheckpointError
from tts_policy.policy.network import PolicyNetwork
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.policy.validation import quoted

MAX_VALUES = 4096
LONGEST_NAME = 200
_HEAD = """\
# Draft of the parameters of `policy_node` for {name}. Complete what is marked TODO, then:
#   ros2 launch tts_policy policy.launch.py bundle:={bundle} params_file:={bundle}/parameters.yaml
# Every parameter: ros2 param describe /tts_policy PARAMETER
#
# TODO topics: the node reads the relative topics below; remap your own to them.
{topics}
# TODO limits: lower and upper are the range of actions seen in training. Take the robot's own
# where they are tighter. The node refuses the zeros: velocity is the highest speed of every joint,
# first_point the largest distance of a chunk's first point from where the arm is measured.
"""


@dataclass(frozen=True)
class Naming:
    """What a checkpoint does not say: the control period, and names where they are given."""

    period_s: float
    observation_joints: tuple[str, ...] = ()
    action_joints: tuple[str, ...] = ()

    def joints(
        self, observed: Sequence[tuple[str, int]], action_dim: int
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of observed vectors, given as (key, length), and of the actions.

        Raises
        ------
        CheckpointError
            if names are given, but not as many as there are values, or a length is absurd.

        """
        # Before anything is made of these lengths: a damaged one would take all memory.
        for what, count in (('observation', sum(n for _, n in observed)), ('action', action_dim)):
            if not 1 <= count <= MAX_VALUES:
                raise CheckpointError(
                    f'{what}: expected 1 to {MAX_VALUES} values, got {quoted(count)}'
                )
        for key, _ in observed:
            if len(key) > LONGEST_NAME:
                raise CheckpointError(
                    f'observation: expected a name of at most {LONGEST_NAME} characters, '
                    f'got {quoted(key)}'
                )
        names = tuple(f'{key}_{n}' for key, length in observed for n in range(length))
        acted = tuple(f'action_{n}' for n in range(action_dim))
        for what, given, default in (
            ('observation', self.observation_joints, names),
            ('action', self.action_joints, acted),
        ):
            if given and len(given) != len(default):
                raise CheckpointError(
                    f'{what} joints: expected {len(default)} names, got {len(given)}'
                )
        return self.observation_joints or names, self.action_joints or acted


@dataclass(frozen=True)
class ConvertedPolicy:
    """A policy of another project: its name, network, samplers, and remarks for the user."""

    name: str
    network: PolicyNetwork
    samplers: dict[str, SamplerSpec]
    remarks: tuple[str, ...]


def parameter_file(converted: ConvertedPolicy, bundle: Path) -> str:
    """Text of the parameter file."""
    contract, network = converted.network.contract, converted.network
    action = network.action_normalizer
    low = action.unnormalize(-action.scale.new_ones(action.scale.shape))
    high = action.unnormalize(action.scale.new_ones(action.scale.shape))
    sampler = next(iter(converted.samplers))
    topics = [
        'joint_states      sensor_msgs/JointState, ' + ', '.join(contract.observation.joints)
    ]
    topics += [
        f'{c.key}/image   sensor_msgs/Image, scaled to {c.height} x {c.width}'
        for c in contract.observation.cameras
    ]
    unknown = [0.0] * len(contract.action.joints)
    values = {
        'sampler': sampler,
        'device': 'cpu',
        'sparsity': 0.0,  # dense, until the user has seen what the policy stands
        'n_execute': 0,
        'enable_output': False,
        'limits': {
            'joints': list(contract.action.joints),
            'lower': [round(float(value), 4) for value in low],
            'upper': [round(float(value), 4) for value in high],
            'velocity': unknown,
            'first_point': list(unknown),
        },
    }
    text = yaml.safe_dump(
        {'/**/tts_policy': {'ros__parameters': values}}, sort_keys=False, width=99
    )
    for name in ('velocity', 'first_point'):
        text = text.replace(f'{name}:\n', f'{name}:  # TODO\n')
    head = _HEAD.format(
        name=converted.name, bundle=bundle, topics='\n'.join(f'#   {line}' for line in topics)
    )
    return head + text
