# SPDX-License-Identifier: Apache-2.0
"""A cell of the fault tests: a node whose policy can be spoiled, a scripted robot and a witness.

The fixtures of `conftest.py` start one node for every module of fault tests; a test that ends or
slows a node starts one of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from feeder import Feeder
from processes import RosProcess, wait_until
from witness import ACCELERATION, FIRST_POINT, LOWER, TOLERANCE, UPPER, VELOCITY, Witness

if TYPE_CHECKING:
    from rclpy.node import Node

FOLDER = str(Path(__file__).parent)
PARAMETERS: dict[str, Any] = {
    'enable_output': 'true',
    'n_execute': 4,
    'max_skew_s': 0.02,
    'gap_limit_s': 2.0,
    'inference_timeout_s': 1.2,
    'min_points': 3,
    'limits.joints': '[shoulder, elbow, finger]',
    'limits.lower': LOWER.tolist(),
    'limits.upper': UPPER.tolist(),
    'limits.velocity': [VELOCITY] * 3,
    'limits.acceleration': [ACCELERATION] * 3,
    'limits.first_point': [FIRST_POINT] * 3,
    'limits.tolerance': TOLERANCE,
}


def start_node(small_bundle: Path, namespace: str, load_s: str = '0', **more: Any) -> RosProcess:
    """Start the node whose policy can be spoiled; it configures and activates itself."""
    arguments = ['--ros-args', '-r', f'__ns:={namespace}']
    values = {**PARAMETERS, 'bundle': small_bundle, 'autostart': 'true', **more}
    for name, value in values.items():
        arguments += ['-p', f'{name}:={value}']
    return RosProcess('faulty_node', *arguments, PYTHONPATH=FOLDER, LOAD_S=load_s)


def own_node(
    test_node: Node, small_bundle: Path, namespace: str, **more: Any
) -> tuple[RosProcess, Feeder, Witness]:
    """Start a node for one test alone."""
    witness = Witness(test_node, namespace)
    feeder = Feeder(test_node, namespace)
    process = start_node(small_bundle, namespace, **more)
    wait_until(lambda: feeder.matched, 20, f'subscriptions\n{process.output}')
    return process, feeder, witness


def moving(feeder: Feeder, output: str = '') -> None:
    """Wait until new commands come."""
    feeder.forget()
    wait_until(lambda: len(feeder.commands) >= 2, 4, f'an arm in motion\n{output}')


def reported(feeder: Feeder, reason: str) -> None:
    """Wait for diagnostics above OK that contain the reason."""

    def found() -> bool:
        status = feeder.status
        return status is not None and status.level != b'\x00' and reason in status.message

    try:
        wait_until(found, 4, f'diagnostics with {reason!r}')
    except pytest.fail.Exception as error:
        raise AssertionError(f'{error}; last was {feeder.status}') from error


def held(feeder: Feeder) -> None:
    """Wait until the last command is a hold point: one point."""
    wait_until(lambda: feeder.commands and len(feeder.commands[-1].points) == 1, 2, 'hold')
