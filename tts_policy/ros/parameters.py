# SPDX-License-Identifier: Apache-2.0
"""Every parameter of the node in one table, its declaration and its validation.

LIVE parameters take effect at the next tick. STRUCTURAL ones may be set until configure and are
refused, with the reason, while the node is configured. START ones are read once and are read-only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.exceptions import (
    InvalidParameterTypeException,
    InvalidParameterValueException,
    ParameterUninitializedException,
)
from rclpy.parameter import Parameter

from tts_policy.ros.conversions import seconds_to_ns
from tts_policy.ros.observation import WindowSpec
from tts_policy.ros.output import HoldRule
from tts_policy.ros.trajectory import JointLimits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rclpy.node import Node

    from tts_policy.core.contract import PolicyContract
    from tts_policy.core.policy import TestTimeSparsePolicy

Type = Parameter.Type


class ParameterError(ValueError):
    """A parameter value that cannot work; one line: name, expected, got."""


class Change(Enum):
    """When a parameter may be changed."""

    LIVE = 'live'
    STRUCTURAL = 'fixed while configured'
    START = 'read-only'


@dataclass(frozen=True)
class ParameterSpec:
    """One row: an array type without a default is simply unset until somebody sets it."""

    name: str
    type: Parameter.Type
    default: Any
    change: Change
    unit: str
    description: str
    low: float | None = None
    high: float | None = None

    def descriptor(self) -> ParameterDescriptor:
        """ROS descriptor: text with unit and change rule, range where there is one."""
        unit = f' [{self.unit}]' if self.unit else ''
        descriptor = ParameterDescriptor(
            name=self.name,
            type=self.type.value,
            description=f'{self.description}{unit} ({self.change.value})',
            read_only=self.change is Change.START,
        )
        if self.low is not None and self.high is not None:
            if self.type is Type.DOUBLE:
                span = FloatingPointRange(from_value=float(self.low), to_value=float(self.high))
                descriptor.floating_point_range = [span]
            else:
                span = IntegerRange(from_value=int(self.low), to_value=int(self.high), step=1)
                descriptor.integer_range = [span]
        return descriptor


def _row(
    change: Change, name: str, kind: Parameter.Type, default: Any, *rest: Any
) -> ParameterSpec:
    unit, description, *span = rest
    return ParameterSpec(name, kind, default, change, unit, description, *span)


_live = partial(_row, Change.LIVE)
_fixed = partial(_row, Change.STRUCTURAL)

# fmt: off
PARAMETERS: tuple[ParameterSpec, ...] = (
    _fixed('bundle', Type.STRING, '', '', 'Path of the model bundle, a folder with model.yaml'),
    _fixed('sampler', Type.STRING, 'ddim10', '', 'Sampler of the bundle to run'),
    _fixed('device', Type.STRING, 'cpu', '', 'Torch device'),
    _fixed('threads', Type.INTEGER, 1, '',
           'Torch threads; more than one hurts beside a busy core', 1, 256),
    _fixed('seed', Type.INTEGER, 0, '',
           'Seed of the noise held within an episode', 0, 2**31 - 1),
    _live('sparsity', Type.DOUBLE, 0.8, '',
          'Share of the plan that is reused; 0 is dense', 0.0, 1.0),
    _live('n_execute', Type.INTEGER, 0, 'periods',
          'Replan interval; 0 takes the one of the bundle', 0, 1024),
    _live('enable_output', Type.BOOL, False, '',
          'Publish on joint_trajectory; otherwise on ~/proposed_trajectory'),
    _fixed('max_observation_age_s', Type.DOUBLE, 0.25, 's',
           'Older input gives no chunk', 0.001, 60.0),
    _fixed('sample_tolerance_s', Type.DOUBLE, 0.0, 's',
           'Largest distance of a sample from its time; 0 takes half a period', 0.0, 10.0),
    _fixed('gap_limit_s', Type.DOUBLE, 0.5, 's',
           'A longer gap in the stamps of a topic resets the policy', 0.01, 3600.0),
    _fixed('future_limit_s', Type.DOUBLE, 0.1, 's',
           'A message stamped further ahead of the clock waits for it', 0.0, 60.0),
    _fixed('reliable_sensors', Type.BOOL, False, '',
           'Subscribe to the sensors with reliable instead of best-effort QoS'),
    _fixed('hold_delay_s', Type.DOUBLE, 0.1, 's',
           'Time until a hold-position point is due', 0.001, 10.0),
    _fixed('hold_last_command', Type.STRING_ARRAY, None, '',
           'Joints (a gripper) that hold the last command instead of the measured position'),
    _fixed('limits.joints', Type.STRING_ARRAY, None, '',
           'Joints the limits belong to: all of the bundle, in any order'),
    _fixed('limits.lower', Type.DOUBLE_ARRAY, None, 'rad or m', 'Lowest position per joint'),
    _fixed('limits.upper', Type.DOUBLE_ARRAY, None, 'rad or m', 'Highest position per joint'),
    _fixed('limits.velocity', Type.DOUBLE_ARRAY, None, 'rad/s or m/s',
           'Highest speed between two set-points per joint'),
    _fixed('limits.first_point', Type.DOUBLE_ARRAY, None, 'rad or m',
           'Longest way from the measured state to the first point per joint'),
    _fixed('limits.tolerance', Type.DOUBLE, 0.02, '',
           'Share of a bound by which it may be exceeded; positions are clipped', 0.0, 0.5),
    _row(Change.START, 'autostart', Type.BOOL, False, '',
         'Configure and activate without being asked'),
)
# fmt: on

_BY_NAME = {spec.name: spec for spec in PARAMETERS}


@dataclass(frozen=True)
class Settings:
    """Values of the parameters at one moment; unset arrays are None."""

    values: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        """Value of the parameter of that name."""
        return self.values[name]

    def ns(self, name: str) -> int:
        """Value of a parameter in seconds, as whole nanoseconds."""
        return seconds_to_ns(self.values[name])


def declare(node: Node) -> None:
    """Declare the whole table on a node.

    Raises
    ------
    ParameterError
        for an override of a wrong type or out of range.

    """
    for spec in PARAMETERS:
        value = spec.type if spec.default is None else spec.default
        try:
            node.declare_parameter(spec.name, value, spec.descriptor())
        except (InvalidParameterTypeException, InvalidParameterValueException) as error:
            raise ParameterError(
                f'{spec.name}: expected {_expected(spec)}, got another value at start: {error}'
            ) from error


def read(node: Node) -> Settings:
    """Values of every parameter of the table."""
    values = {}
    for spec in PARAMETERS:
        try:
            values[spec.name] = node.get_parameter(spec.name).value
        except ParameterUninitializedException:
            values[spec.name] = None
    return Settings(values)


def refusal(
    changes: Sequence[Parameter], configured: bool, policy: TestTimeSparsePolicy | None
) -> str | None:
    """Why a set of changes is refused, None when it is not.

    Type and range of the table are checked by rclpy before; here are the rules that depend on the
    state of the node and on the policy it runs.
    """
    for change in changes:
        spec = _BY_NAME.get(change.name)
        if spec is None:
            continue
        if spec.change is Change.STRUCTURAL and configured:
            return f'{spec.name} is fixed while the node is configured: clean up, set, configure'
        if spec.type is Type.DOUBLE and not math.isfinite(change.value):
            return f'{spec.name}: expected {_expected(spec)}, got {change.value}'
        if policy is None:
            continue
        try:
            check_with_policy(policy, {change.name: change.value})
        except ValueError as error:
            return str(error)
    return None


def check_with_policy(policy: TestTimeSparsePolicy, values: dict[str, Any]) -> None:
    """Check the values that depend on the policy: sparsity and n_execute.

    Raises
    ------
    ValueError
        naming the limit.

    """
    if 'sparsity' in values:
        policy.check_sparsity(values['sparsity'])
    usable = policy.contract.usable_actions
    n_execute = values.get('n_execute', 0)
    if n_execute > usable:
        raise ParameterError(
            f'n_execute: expected at most the {usable} usable actions of a chunk, got {n_execute}'
        )


def window_spec(settings: Settings, contract: PolicyContract) -> WindowSpec:
    """Observation window for a contract; its first camera is the reference, joints without one."""
    observation = contract.observation
    period_ns = seconds_to_ns(observation.period_s)
    return WindowSpec(
        keys=(*(camera.key for camera in observation.cameras), 'joints'),
        steps=observation.steps,
        period_ns=period_ns,
        tolerance_ns=settings.ns('sample_tolerance_s') or period_ns // 2,
        max_age_ns=settings.ns('max_observation_age_s'),
        gap_limit_ns=settings.ns('gap_limit_s'),
        future_limit_ns=settings.ns('future_limit_s'),
    )


def hold_rule(settings: Settings) -> HoldRule:
    """How to hold the position."""
    return HoldRule(
        delay_ns=settings.ns('hold_delay_s'),
        last_command=settings['hold_last_command'] or (),
        max_age_ns=settings.ns('max_observation_age_s'),
    )


def joint_limits(settings: Settings, joints: Sequence[str]) -> JointLimits:
    """Limits for the joints of the contract, mapped by name; unbounded where none are set.

    Raises
    ------
    ParameterError
        for names that are not exactly the contract's, or arrays that do not fit them.

    """
    names = settings['limits.joints']
    arrays = {
        key: settings[f'limits.{key}'] for key in ('lower', 'upper', 'velocity', 'first_point')
    }
    if not names:
        given = [f'limits.{key}' for key, value in arrays.items() if value]
        if given:
            raise ParameterError(
                f'limits.joints: expected the joints that {given} belong to, got none'
            )
        return JointLimits.unbounded(joints)
    if sorted(names) != sorted(joints):
        raise ParameterError(
            f'limits.joints: expected exactly the joints of the bundle {list(joints)}, '
            f'got {list(names)}'
        )
    order = [list(names).index(joint) for joint in joints]
    columns = {}
    for key, value in arrays.items():
        fill = -np.inf if key == 'lower' else np.inf
        column = np.full(len(joints), fill) if not value else np.asarray(value, dtype=np.float64)
        if column.shape != (len(joints),) or np.isnan(column).any():
            raise ParameterError(
                f'limits.{key}: expected {len(joints)} numbers, one per limits.joints, '
                f'got {list(value)}'
            )
        columns[key] = column[order]
    if not (columns['lower'] < columns['upper']).all():
        raise ParameterError('limits.lower: expected less than limits.upper for every joint')
    for key in ('velocity', 'first_point'):
        if not (columns[key] > 0.0).all():
            raise ParameterError(f'limits.{key}: expected positive numbers, got {arrays[key]}')
    return JointLimits(
        tuple(joints),
        columns['lower'],
        columns['upper'],
        columns['velocity'],
        columns['first_point'],
        settings['limits.tolerance'],
    )


def _expected(spec: ParameterSpec) -> str:
    span = f' in [{spec.low}, {spec.high}]' if spec.low is not None else ''
    return f'{spec.type.name.lower()}{span}'
