# SPDX-License-Identifier: Apache-2.0
"""Launch the policy node, by default as a dry run.

    ros2 launch tts_policy policy.launch.py bundle:=/path/to/bundle

Chunks go to ~/proposed_trajectory until enable_output is true, here or as a live parameter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ament_index_python.packages import get_package_share_directory
from launch import LaunchContext, LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable
from launch.substitutions import EnvironmentVariable, LaunchConfiguration
from launch_ros.actions import LifecycleNode
from launch_ros.parameter_descriptions import ParameterValue

SHARE = Path(get_package_share_directory('tts_policy'))
# Fast DDS 2 (Jazzy) reads the first, Fast DDS 3 (Kilted) the second.
FASTDDS_PROFILES = ('FASTRTPS_DEFAULT_PROFILES_FILE', 'FASTDDS_DEFAULT_PROFILES_FILE')
BOOLEAN = ['true', 'false']

ARGUMENTS = [
    DeclareLaunchArgument(
        'params_file',
        default_value=str(SHARE / 'config' / 'panda_lift.yaml'),
        description='Parameter file of the node.',
    ),
    DeclareLaunchArgument(
        'bundle',
        default_value=str(SHARE / 'models' / 'panda_lift'),
        description='Model bundle, a folder with model.yaml.',
    ),
    DeclareLaunchArgument(
        'namespace', default_value='', description='Namespace of the node and of its topics.'
    ),
    DeclareLaunchArgument(
        'autostart',
        default_value='true',
        choices=BOOLEAN,
        description='Configure and activate the node; otherwise it waits for a lifecycle manager.',
    ),
    DeclareLaunchArgument(
        'use_sim_time', default_value='false', choices=BOOLEAN, description='Time from /clock.'
    ),
    DeclareLaunchArgument(
        'enable_output',
        default_value='false',
        choices=BOOLEAN,
        description='Publish commands on joint_trajectory; false is a dry run.',
    ),
    DeclareLaunchArgument(
        'device', default_value='', description='Torch device; empty: as params_file says.'
    ),
    DeclareLaunchArgument(
        'sampler',
        default_value='',
        description='Sampler of the bundle, ddim10 for instance; empty: as params_file says.',
    ),
    DeclareLaunchArgument(
        'sparsity',
        default_value='',
        description='Share of reused computation, 0 is dense; empty: as params_file says.',
    ),
    DeclareLaunchArgument(
        'reliable_sensors',
        default_value='',
        description='Ask for reliable sensors, true or false; empty: as params_file says.',
    ),
    DeclareLaunchArgument(
        'remap',
        default_value='',
        description='Topics under other names, separated by spaces: camera/image:=/front/image.',
    ),
    DeclareLaunchArgument(
        'realtime_priority',
        default_value='0',
        description='Priority 1 to 99 of the node under SCHED_FIFO (chrt); 0: no priority.',
    ),
    DeclareLaunchArgument(
        'log_level', default_value='info', description='Level of the node: debug to fatal.'
    ),
]


def _policy_node(context: LaunchContext) -> list[LifecycleNode]:
    """Create the node; only arguments that were given override the parameter file."""
    overrides: dict[str, Any] = {
        name: ParameterValue(LaunchConfiguration(name), value_type=bool)
        for name in ('autostart', 'use_sim_time', 'enable_output')
    }
    for name, kind in (
        ('bundle', str),
        ('device', str),
        ('sampler', str),
        ('sparsity', float),
        ('reliable_sensors', bool),
    ):
        if LaunchConfiguration(name).perform(context):
            overrides[name] = ParameterValue(LaunchConfiguration(name), value_type=kind)
    params_file = Path(LaunchConfiguration('params_file').perform(context))
    if not params_file.is_file():
        raise RuntimeError(f'params_file: expected a file, got {str(params_file)!r}')
    remap = LaunchConfiguration('remap').perform(context).split()
    priority = LaunchConfiguration('realtime_priority').perform(context)
    if not priority.isdecimal() or int(priority) > 99:
        raise RuntimeError(f'realtime_priority: expected 0 to 99, got {priority!r}')
    return [
        LifecycleNode(
            package='tts_policy',
            executable='policy_node',
            name='tts_policy',
            namespace=LaunchConfiguration('namespace'),
            parameters=[LaunchConfiguration('params_file'), overrides],
            remappings=[tuple(pair.split(':=', 1)) for pair in remap],
            ros_arguments=['--log-level', ['tts_policy:=', LaunchConfiguration('log_level')]],
            # The command replaces itself by the node, which keeps its process id and its signals.
            prefix=f'chrt --fifo {int(priority)}' if int(priority) else None,
            output='screen',
            emulate_tty=True,
        )
    ]


def generate_launch_description() -> LaunchDescription:
    """Describe the launch of the policy node."""
    profile = str(SHARE / 'config' / 'fastdds.xml')
    return LaunchDescription(
        [
            *ARGUMENTS,
            # With the default profile most camera images are lost; a profile of the user's stays.
            *(
                SetEnvironmentVariable(name, EnvironmentVariable(name, default_value=profile))
                for name in FASTDDS_PROFILES
            ),
            OpaqueFunction(function=_policy_node),
        ]
    )
