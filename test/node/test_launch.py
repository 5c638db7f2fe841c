# SPDX-License-Identifier: Apache-2.0
"""Launch files and configuration: complete, described, and what they start ends on SIGINT."""

from __future__ import annotations

import ast
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from processes import BUSY_FACTOR, END_LIMIT_S, REPOSITORY, child_environment

from tts_policy.policy.contract import read_contract

LAUNCH_FILES = ('policy.launch.py', 'demo.launch.py')
EXPECTED_ARGUMENTS = {
    'params_file',
    'bundle',
    'namespace',
    'autostart',
    'use_sim_time',
    'enable_output',
    'device',
    'sampler',
    'sparsity',
}


CONTRACTS = sorted(path.name for path in (REPOSITORY / 'config').glob('*.contract.yaml'))
CONFIGURATIONS = sorted(
    path.name
    for path in (REPOSITORY / 'config').glob('*.yaml')
    if path.name not in CONTRACTS and 'ros__parameters:' in path.read_text(encoding='utf-8')
)


def config(name: str) -> dict[str, Any]:
    """Return the parameters of a configuration, nested ones with a dot in their name."""
    text = (REPOSITORY / 'config' / name).read_text(encoding='utf-8')
    values: dict[str, Any] = {}
    for key, value in yaml.safe_load(text)['/**/tts_policy']['ros__parameters'].items():
        nested = value.items() if isinstance(value, dict) else [('', value)]
        values.update({f'{key}.{inner}' if inner else key: item for inner, item in nested})
    return values


@pytest.mark.parametrize('name', CONFIGURATIONS)
def test_every_parameter_of_a_configuration_exists_and_is_in_range(name: str) -> None:
    pytest.importorskip('rclpy', reason='rclpy is not installed')
    from tts_policy.node.parameter_table import PARAMETERS

    values = config(name)
    specs = {spec.name: spec for spec in PARAMETERS}
    assert set(values) <= set(specs)
    for name, value in values.items():
        spec = specs[name]
        if spec.default is not None:
            assert type(value) is type(spec.default), name
        if spec.low is not None and spec.high is not None:
            assert spec.low <= value <= spec.high, name
        if spec.choices:
            assert value in spec.choices, name


@pytest.mark.parametrize('name', CONFIGURATIONS)
def test_a_configuration_moves_nothing_and_bounds_every_joint(name: str) -> None:
    pytest.importorskip('rclpy', reason='rclpy is not installed')
    from tts_policy.node.parameter_table import PARAMETERS
    from tts_policy.node.parameters import Settings, joint_limits

    values = config(name)
    assert values['enable_output'] is False
    settings = Settings({**{spec.name: spec.default for spec in PARAMETERS}, **values})
    limits = joint_limits(settings, values['limits.joints'])
    for bound in (limits.lower, limits.upper, limits.velocity, limits.first_distance):
        assert np.isfinite(bound).all()
    assert set(values.get('hold_last_command', [])) <= set(limits.joints)
    assert set(values.get('gripper.joints', [])) <= set(limits.joints)


@pytest.mark.parametrize('name', CONTRACTS)
def test_the_contract_of_a_robot_agrees_with_its_parameters(name: str) -> None:
    """Adding a robot is these two files."""
    contract = read_contract(REPOSITORY / 'config' / name)
    values = config(name.replace('.contract', ''))
    assert sorted(values['limits.joints']) == sorted(contract.action.joints)
    assert set(values.get('gripper.joints', [])) < set(contract.action.joints)
    assert values['min_points'] <= contract.usable_actions - contract.action.execute
    assert values['max_observation_age_s'] >= contract.observation.period_s


def test_limits_of_the_panda_belong_to_the_joints_of_the_task() -> None:
    pytest.importorskip('rosbags', reason='rosbags is not installed')
    from tts_policy.sim.panda import PANDA_CONTRACT

    values = config('panda_lift.yaml')
    assert sorted(values['limits.joints']) == sorted(PANDA_CONTRACT.action.joints)
    upper = dict(zip(values['limits.joints'], values['limits.upper'], strict=True))
    assert upper['panda_finger_joint1'] == 0.04
    assert upper['panda_joint4'] == -0.0698


def test_fast_dds_profile_has_large_shared_memory_beside_udp() -> None:
    root = ElementTree.parse(REPOSITORY / 'config' / 'fastdds.xml').getroot()
    texts = {element.tag.split('}')[-1]: element.text for element in root.iter()}
    assert int(texts['segment_size'] or 0) == 33_554_432
    assert int(texts['maxMessageSize'] or 0) == 4_194_304
    kinds = [element.text for element in root.iter() if element.tag.endswith('}type')]
    assert kinds == ['SHM', 'UDPv4']


def installed_launch_file(name: str) -> Path:
    """Return the installed launch file; skip where launch or the package are not installed."""
    pytest.importorskip('launch', reason='launch is not installed (not on PyPI)')
    pytest.importorskip('launch_ros', reason='launch_ros is not installed (not on PyPI)')
    from ament_index_python.packages import PackageNotFoundError, get_package_share_directory

    try:
        share = Path(get_package_share_directory('tts_policy'))
    except PackageNotFoundError:
        pytest.skip('tts_policy is not installed: AMENT_PREFIX_PATH has no share/tts_policy')
    return share / 'launch' / name


@pytest.mark.parametrize('name', LAUNCH_FILES)
def test_launch_arguments_are_complete_and_described(name: str) -> None:
    path = installed_launch_file(name)
    spec = importlib.util.spec_from_file_location('launch_file', path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arguments = module.generate_launch_description().get_launch_arguments()
    assert {argument.name for argument in arguments} >= EXPECTED_ARGUMENTS
    assert all(len(argument.description) > 10 for argument in arguments)


def forwarded(name: str) -> set[str]:
    """Arguments that a launch file passes on to policy.launch.py; read without launch."""
    tree = ast.parse((REPOSITORY / 'launch' / name).read_text(encoding='utf-8'))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == 'FORWARDED':
            assert isinstance(node.value, ast.Dict)
            return {ast.literal_eval(key) for key in node.value.keys if key is not None}
    raise AssertionError(f'{name}: expected FORWARDED, got none')


def declared(name: str) -> set[str]:
    """Arguments that a launch file declares by name; read without launch."""
    tree = ast.parse((REPOSITORY / 'launch' / name).read_text(encoding='utf-8'))
    return {
        ast.literal_eval(node.args[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == 'DeclareLaunchArgument'
        and isinstance(node.args[0], ast.Constant)
    }


@pytest.mark.parametrize('name', ['demo.launch.py', 'replay.launch.py'])
def test_what_is_passed_on_is_an_argument_of_the_policy(name: str) -> None:
    assert forwarded(name) <= declared('policy.launch.py')


def test_the_demo_can_run_the_policy_under_a_realtime_priority() -> None:
    assert {'realtime_priority', 'log_level'} <= forwarded('demo.launch.py')


@pytest.mark.fault
def test_a_replay_plays_what_the_policy_subscribes_to_and_no_recorded_command() -> None:
    pytest.importorskip('rclpy', reason='rclpy is not installed')
    from tts_policy.node.interface import replayed_topics

    commands = ['/joint_trajectory', '/joint_trajectory_controller/joint_trajectory']
    recorded = ['/camera/image', '/front/image', '/joint_states', '/clock', *commands]
    played = replayed_topics(recorded, ['camera'])
    assert played.topics == ['/camera/image', '/joint_states'] and not played.moved
    remapped = {'camera/image': '/front/image', 'joint_trajectory': commands[1]}
    played = replayed_topics(recorded, ['camera'], 'left', remapped)
    assert played.topics == ['/front/image'] and played.cameras == {'camera': '/front/image'}
    asked = replayed_topics(recorded, ['camera'], requested=['/joint_states', *commands])
    assert asked.moved == {command: f'/recorded{command}' for command in commands}


LAUNCH = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource

service = LaunchService()
arguments = [tuple(argument.split(':=')) for argument in sys.argv[2:]]
source = PythonLaunchDescriptionSource(sys.argv[1])
include = IncludeLaunchDescription(source, launch_arguments=arguments)
service.include_launch_description(LaunchDescription([include]))
sys.exit(service.run())
"""


def test_policy_launch_starts_a_dry_run_that_ends_within_two_seconds_of_sigint(
    small_bundle: Path, tmp_path: Path
) -> None:
    path = installed_launch_file('policy.launch.py')
    parameters = tmp_path / 'parameters.yaml'
    parameters.write_text('/**:\n  ros__parameters:\n    sampler: ddim10\n    sparsity: 0.4\n')
    log = tmp_path / 'log'
    with log.open('w') as output:
        process = subprocess.Popen(
            [
                sys.executable,
                *('-c', LAUNCH, str(path)),
                *(f'bundle:={small_bundle}', f'params_file:={parameters}', 'sparsity:=0.5'),
                'namespace:=left',
            ],
            env=child_environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        end_s = time.monotonic() + 90.0
        while 'output disabled' not in log.read_text() and time.monotonic() < end_s:
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        # As Ctrl-C in a terminal: to launch and to all that it started.
        os.killpg(process.pid, signal.SIGINT)
        process.wait(BUSY_FACTOR * END_LIMIT_S)
    text = log.read_text()
    assert '[left.tts_policy]: active, output disabled (dry run)' in text
    assert 'sparsity 0.5 of' in text
    assert 'finished cleanly' in text
