# SPDX-License-Identifier: Apache-2.0
"""Launch the simulated Panda and a policy for one of its tasks; by default it lifts a cube.

    ros2 launch tts_policy demo.launch.py
    ros2 service call /robot/reset std_srvs/srv/Trigger      # begins an episode, and the next

In lockstep simulated time waits for the policy; in realtime it does not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ament_index_python.packages import get_package_share_directory
from launch import LaunchContext, LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    GroupAction,
    IncludeLaunchDescription,
    OpaqueFunction,
    Shutdown,
)
from launch.events.process import ProcessExited
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import (
    EqualsSubstitution,
    IfElseSubstitution,
    LaunchConfiguration,
)
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue

from tts_policy.sim.tasks import PANDA_TASKS

SHARE = Path(get_package_share_directory('tts_policy'))
# Passed on as they are; policy.launch.py says what they mean and what an empty one does.
FORWARDED = {
    'params_file': (str(SHARE / 'config' / 'panda_lift.yaml'), 'Parameter file of the policy.'),
    'bundle': (
        [str(SHARE / 'models' / 'panda_'), LaunchConfiguration('task')],
        "Model bundle, a folder with model.yaml; the task's unless given.",
    ),
    'namespace': ('', 'Namespace of both nodes.'),
    'autostart': ('true', 'Configure and activate the policy.'),
    'enable_output': ('true', 'Let the policy move the simulated robot.'),
    'device': ('', 'Torch device; empty: as params_file says.'),
    'sampler': ('', 'Sampler of the bundle; empty: as params_file says.'),
    'sparsity': ('', 'Share of reused computation; empty: as params_file says.'),
    'realtime_priority': ('0', 'Priority 1 to 99 of the policy under SCHED_FIFO; 0: none.'),
    'log_level': ('info', 'Level of the policy node: debug to fatal.'),
}


def _end(event: ProcessExited, context: LaunchContext) -> list[Shutdown]:
    """End everything when the robot ends by itself; launch fails on a second shutdown."""
    return [] if context.is_shutdown else [Shutdown(reason='the robot is gone')]


def _robot_node(context: LaunchContext) -> list[Node]:
    """Create the robot; without a time limit given it takes that of the task."""
    parameters: dict[str, Any] = {
        'task': ParameterValue(LaunchConfiguration('task'), value_type=str),
        'clock': LaunchConfiguration('clock'),
        'seed': ParameterValue(LaunchConfiguration('seed'), value_type=int),
    }
    if LaunchConfiguration('episode_s').perform(context):
        parameters['episode_s'] = ParameterValue(
            LaunchConfiguration('episode_s'), value_type=float
        )
    return [
        Node(
            package='tts_policy',
            executable='robot_node',
            name='robot',
            namespace=LaunchConfiguration('namespace'),
            parameters=[parameters],
            output='screen',
            emulate_tty=True,
            on_exit=_end,
        )
    ]


def generate_launch_description() -> LaunchDescription:
    """Describe the launch of robot and policy."""
    arguments = [
        DeclareLaunchArgument(
            'task',
            default_value='lift',
            choices=list(PANDA_TASKS),
            description='Task of the robot; the bundle must be trained for it.',
        ),
    ]
    arguments += [
        DeclareLaunchArgument(name, default_value=default, description=description)
        for name, (default, description) in FORWARDED.items()
    ]
    arguments += [
        DeclareLaunchArgument(
            'clock',
            default_value='lockstep',
            choices=['lockstep', 'realtime'],
            description='Clock of the simulation.',
        ),
        DeclareLaunchArgument(
            'use_sim_time',
            default_value=IfElseSubstitution(
                EqualsSubstitution(LaunchConfiguration('clock'), 'lockstep'), 'true', 'false'
            ),
            description='Whether the policy uses /clock; by default it does in lockstep.',
        ),
        DeclareLaunchArgument(
            'seed', default_value='1000', description='Seed of the first episode.'
        ),
        DeclareLaunchArgument(
            'episode_s',
            default_value='',
            description='Time limit of an episode in seconds; empty: that of the task.',
        ),
    ]
    policy = IncludeLaunchDescription(
        PythonLaunchDescriptionSource(str(SHARE / 'launch' / 'policy.launch.py')),
        launch_arguments=[
            (name, LaunchConfiguration(name)) for name in (*FORWARDED, 'use_sim_time')
        ],
    )
    return LaunchDescription(
        [*arguments, GroupAction([policy]), OpaqueFunction(function=_robot_node)]
    )
