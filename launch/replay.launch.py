# SPDX-License-Identifier: Apache-2.0
"""Launch the policy node against a recording, as a dry run on simulated time.

    ros2 launch tts_policy replay.launch.py bag:=/path/to/bag

In lockstep the recording waits for every chunk, and the ticks are those of evaluate_bag. Paced, it
begins when the policy is active; player:=ros2 is `ros2 bag play`, which cannot wait for the policy
and begins after delay:=. Only what the policy subscribes to is played, and the clock. Other topics
are played if they are named with topics:=, below /recorded, where no controller listens.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch import LaunchContext, LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    ExecuteProcess,
    IncludeLaunchDescription,
    OpaqueFunction,
    Shutdown,
)
from launch.events.process import ProcessExited
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from tts_policy.data.reader import BagReader
from tts_policy.node.interface import replayed_topics
from tts_policy.policy.contract import read_contract

SHARE = Path(get_package_share_directory('tts_policy'))
# Passed on as they are; policy.launch.py says what they mean and what an empty one does.
FORWARDED = {
    'params_file': (str(SHARE / 'config' / 'panda_lift.yaml'), 'Parameter file of the policy.'),
    'bundle': (str(SHARE / 'models' / 'panda_lift'), 'Model bundle, a folder with model.yaml.'),
    'namespace': ('', 'Namespace of the policy and of its topics.'),
    'device': ('', 'Torch device; empty: as params_file says.'),
    'sampler': ('', 'Sampler of the bundle; empty: as params_file says.'),
    'sparsity': ('', 'Share of reused computation; empty: as params_file says.'),
    'remap': ('', 'Topics under other names, separated by spaces: camera/image:=/front/image.'),
}


def _end(event: ProcessExited, context: LaunchContext) -> list[Shutdown]:
    """End everything with the recording; launch fails on a second shutdown."""
    return [] if context.is_shutdown else [Shutdown(reason='the recording has ended')]


def _player(context: LaunchContext) -> list[Node | ExecuteProcess]:
    """Create the player that was asked for; RuntimeError if it is not installed."""
    bag = LaunchConfiguration('bag').perform(context)
    rate = LaunchConfiguration('rate').perform(context)
    player = LaunchConfiguration('player').perform(context)
    namespace = LaunchConfiguration('namespace').perform(context).strip('/')
    root = f'/{namespace}' if namespace else ''
    bundle = Path(LaunchConfiguration('bundle').perform(context))
    replayed = replayed_topics(
        BagReader(Path(bag)).topics,
        [camera.key for camera in read_contract(bundle / 'model.yaml').observation.cameras],
        namespace,
        dict(
            pair.split(':=', 1) for pair in LaunchConfiguration('remap').perform(context).split()
        ),
        LaunchConfiguration('topics').perform(context).split(),
    )
    arguments = [bag, '--rate', rate, '--topics', *replayed.topics]
    if replayed.moved:
        arguments += ['--remap', *(f'{old}:={new}' for old, new in replayed.moved.items())]
    if player == 'ros2':
        if shutil.which('ros2') is None:
            raise RuntimeError(
                'player: expected the command ros2 on PATH for player:=ros2, got none'
            )
        delay = LaunchConfiguration('delay').perform(context)
        command = ['ros2', 'bag', 'play', *arguments, '--clock', '100', '--delay', delay]
        return [ExecuteProcess(cmd=command, output='screen', on_exit=_end)]
    wait = '--lockstep' if player == 'lockstep' else '--after'
    for key, topic in replayed.cameras.items():
        arguments += ['--topic', f'{key}:={topic}']
    return [
        Node(
            package='tts_policy',
            executable='play_bag',
            arguments=[*arguments, wait, f'{root}/tts_policy'],
            output='screen',
            emulate_tty=True,
            on_exit=_end,
        )
    ]


def generate_launch_description() -> LaunchDescription:
    """Describe the launch of policy and player."""
    arguments = [
        DeclareLaunchArgument(name, default_value=default, description=description)
        for name, (default, description) in FORWARDED.items()
    ]
    arguments += [
        DeclareLaunchArgument('bag', description='Recording: folder, .mcap or .db3.'),
        DeclareLaunchArgument(
            'player',
            default_value='lockstep',
            choices=['lockstep', 'paced', 'ros2'],
            description='play_bag waiting for the policy, play_bag at a rate, or ros2 bag play.',
        ),
        DeclareLaunchArgument('rate', default_value='1.0', description='Speed of paced and ros2.'),
        DeclareLaunchArgument(
            'delay', default_value='10', description='Seconds before ros2 bag play begins.'
        ),
        DeclareLaunchArgument(
            'topics',
            default_value='',
            description='Topics to play, separated by spaces; empty: those of the policy.',
        ),
    ]
    policy = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(str(SHARE / 'launch' / 'policy.launch.py')),
        launch_arguments=[
            *((name, LaunchConfiguration(name)) for name in FORWARDED),
            ('use_sim_time', 'true'),
            ('autostart', 'true'),
            ('enable_output', 'false'),
            # The players publish reliably, and a lost image would be a missing tick.
            ('reliable_sensors', 'true'),
        ],
    )
    # A player that cannot be had ends the launch before anything has been started.
    return LaunchDescription([*arguments, OpaqueFunction(function=_player), policy])
