# SPDX-License-Identifier: Apache-2.0
"""A draft of the node's parameter file for a converted policy; the user fills in the rest."""

from __future__ import annotations

from pathlib import Path

import yaml

from tts_policy.convert.converted_policy import ConvertedPolicy

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
