# SPDX-License-Identifier: Apache-2.0
"""The node's parameters: declared from their table, validated, and turned into what they mean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.parameter import Parameter

from tts_policy.control.conversions import seconds_to_ns
from tts_policy.control.images import ImageFit
from tts_policy.control.limits import JointLimits
from tts_policy.control.observation import WindowSpec
from tts_policy.control.output import ChunkTiming, HoldRule
from tts_policy.control.trajectory import due_times_ns
from tts_policy.node.parameter_table import PARAMETERS, Change, ParameterSpec, Type
from tts_policy.node.sensors import SensorOptions
from tts_policy.node.tick_report import TickSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rclpy.node import Node

    from tts_policy.policy.contract import PolicyContract
    from tts_policy.policy.policy import TestTimeSparsePolicy


class ParameterError(ValueError):
    """A parameter value that cannot work; one line: name, expected, got."""


# Parameters under `limits.` with the value that bounds nothing; None: limits.first_point_default.
_LIMITS = {
    'lower': -np.inf,
    'upper': np.inf,
    'velocity': np.inf,
    'acceleration': np.inf,
    'first_point': None,
}
_BY_NAME = {spec.name: spec for spec in PARAMETERS}


@dataclass(frozen=True)
class Settings:
    """Values of the parameters at one moment; arrays that nobody set are empty or None."""

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
        for an override of a wrong type, out of range, or of an unknown name.

    """
    for spec in PARAMETERS:
        value = spec.type if spec.default is None else spec.default
        try:
            declared = node.declare_parameter(spec.name, value, spec.descriptor())
        except (InvalidParameterTypeException, InvalidParameterValueException) as error:
            hint = ' (off is a boolean in YAML: quote it)' if 'off' in spec.choices else ''
            raise ParameterError(
                f'{spec.name}: expected {spec.expected}, got an override that does not fit: '
                f'{error}{hint}'
            ) from error
        if declared.type_ is Parameter.Type.NOT_SET:
            # Left unset, one array would keep `ros2 param dump` from getting any value at all.
            node.set_parameters([Parameter(spec.name, spec.type, [])])
    _refuse_unknown(node)


def _refuse_unknown(node: Node) -> None:
    """Refuse a misspelt override, which would be a limit or a switch that is not there.

    Raises
    ------
    ParameterError
        for the first override that is no parameter, with the nearest one that is.

    """
    for name in node._parameter_overrides:  # rclpy offers no other way to undeclared ones
        if not node.has_parameter(name) and not name.startswith('qos_overrides.'):
            near = get_close_matches(name, _BY_NAME, 1, 0.0)[0]
            raise ParameterError(
                f'{name[:80]!r}: expected a parameter of the node, got an unknown name; '
                f'the nearest is {near!r}'
            )


def read(node: Node) -> Settings:
    """Values of every parameter of the table."""
    return Settings({spec.name: node.get_parameter(spec.name).value for spec in PARAMETERS})


def _bad_value(spec: ParameterSpec, value: Any) -> str | None:
    """Why a value of the right type is refused all the same."""
    finite = spec.type is not Type.DOUBLE or math.isfinite(value)
    if finite and (not spec.choices or value in spec.choices):
        return None
    return f'{spec.name}: expected {spec.expected}, got {value!r}'


def check(settings: Settings) -> None:
    """Check every value as `refusal` does for changes: overrides at the start were not seen there.

    Raises
    ------
    ParameterError
        for the first value that is refused.

    """
    for spec in PARAMETERS:
        value = settings[spec.name]
        reason = None if value is None else _bad_value(spec, value)
        if reason is not None:
            raise ParameterError(reason)


def refusal(
    changes: Sequence[Parameter],
    configured: bool,
    policy: TestTimeSparsePolicy | None,
    latency_s: float = 0.0,
    simulated: bool = False,
) -> str | None:
    """Why a set of changes is refused, None when it is not.

    `latency_s` is what a chunk takes; `simulated` says whether use_sim_time is true.

    Type and range of the table are checked by rclpy before; here are the rules that depend on the
    state of the node and on the policy it runs.
    """
    for change in changes:
        if change.name == 'use_sim_time' and configured and change.value != simulated:
            # Stamps of one clock would be compared with the other one.
            return 'use_sim_time: expected an unconfigured node: clean up, set it, configure again'
        spec = _BY_NAME.get(change.name)
        if spec is None:
            continue
        if spec.change is Change.STRUCTURAL and configured:
            return (
                f'{spec.name}: expected an unconfigured node, as it is fixed while the node is '
                'configured: clean up, set it, configure again'
            )
        reason = _bad_value(spec, change.value)
        if reason is not None:
            return reason
        if policy is None:
            continue
        try:
            check_with_policy(policy, {change.name: change.value})
            if change.name == 'n_execute':
                check_interval(policy.contract, change.value, latency_s)
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


def model_options(settings: Settings) -> tuple[Any, ...]:
    """What `worker.load_policy` is to load, and the sparsity that its latency counts for.

    With a latency budget that is the recommended one (None), which is within its reach.
    """
    names = ('bundle', 'sampler', 'device', 'seed', 'threads', 'engine')
    sparsity = None if settings['latency_budget_s'] > 0.0 else settings['sparsity']
    return (*(settings[name] for name in names), sparsity)


def window_spec(settings: Settings, contract: PolicyContract) -> WindowSpec:
    """Observation window for a contract; its first camera is the reference, joints without one."""
    return WindowSpec.of(
        contract.observation,
        tolerance_ns=settings.ns('sample_tolerance_s'),
        max_age_ns=settings.ns('max_observation_age_s'),
        gap_limit_ns=settings.ns('gap_limit_s'),
        future_limit_ns=settings.ns('future_limit_s'),
        max_skew_ns=settings.ns('max_skew_s'),
    )


def tick_settings(settings: Settings, contract: PolicyContract) -> TickSettings:
    """What the live parameters ask of the next tick."""
    n_execute = settings['n_execute'] or contract.action.execute
    return TickSettings(
        sparsity=settings['sparsity'],
        latency_budget_s=settings['latency_budget_s'],
        interval_ns=n_execute * seconds_to_ns(contract.observation.period_s),
        continuing=settings['hold_committed'],
    )


def chunk_timing(settings: Settings, contract: PolicyContract) -> ChunkTiming:
    """When the points of a chunk are due, and which are worth sending.

    Raises
    ------
    ParameterError
        for more points than a chunk has: none would ever be sent.

    """
    usable, min_points = contract.usable_actions, settings['min_points']
    if min_points > usable:
        raise ParameterError(
            f'min_points: expected at most the {usable} usable actions of a chunk, '
            f'got {min_points}'
        )
    return ChunkTiming(
        joints=contract.action.joints,
        period_ns=seconds_to_ns(contract.observation.period_s),
        offset_steps=contract.action.offset_steps,
        lead_ns=settings.ns('lead_time_s'),
        min_points=min_points,
    )


def check_latency(contract: PolicyContract, settings: Settings, latency_s: float) -> None:
    """Refuse settings with which a chunk that takes `latency_s` is of no use.

    Raises
    ------
    ParameterError
        when it always comes with fewer than `min_points` to go, or as `check_interval` does.

    """
    timing = chunk_timing(settings, contract)
    due_ns = due_times_ns(contract.usable_actions, timing.offset_steps, timing.period_ns)
    left = int((due_ns > seconds_to_ns(latency_s) + timing.lead_ns).sum())
    if left < timing.min_points:
        raise ParameterError(
            f'min_points: expected {timing.min_points} set-points or more still to come after '
            f'{latency_s:.3f} s of latency and lead_time_s {settings["lead_time_s"]:g} s, '
            f'got {left}'
        )
    check_interval(contract, settings['n_execute'], latency_s)


def check_interval(contract: PolicyContract, n_execute: int, latency_s: float) -> None:
    """Refuse a replan interval that leaves the arm without set-points before the next chunk.

    Raises
    ------
    ParameterError
        when interval and latency exceed the usable actions of a chunk.

    """
    period_s, usable = contract.observation.period_s, contract.usable_actions
    interval = n_execute or contract.action.execute
    if interval * period_s + latency_s > usable * period_s:
        raise ParameterError(
            f'n_execute: expected replan interval and latency to fit into the {usable} usable '
            f'actions of a chunk ({usable * period_s:.2f} s), got {interval} periods '
            f'({interval * period_s:.2f} s) and {latency_s:.3f} s'
        )


def sensor_options(settings: Settings) -> SensorOptions:
    """How the sensors come."""
    return SensorOptions(
        reliable=settings['reliable_sensors'],
        compressed=frozenset(settings['compressed_cameras'] or ()),
        fit=ImageFit(settings['image_fit']),
        max_position=settings['max_position'],
    )


def hold_rule(settings: Settings, joints: Sequence[str]) -> HoldRule:
    """How to hold the position of the joints of the contract.

    Raises
    ------
    ParameterError
        for a joint the bundle does not have: a gripper would lose its grip.

    """
    last_command = list(settings['hold_last_command'] or ())
    unknown = [joint for joint in last_command if joint not in joints]
    if unknown:
        raise ParameterError(
            f'hold_last_command: expected joints of the bundle {list(joints)}, got {unknown}'
        )
    return HoldRule(
        delay_ns=settings.ns('hold_delay_s'),
        last_command=last_command,
        max_age_ns=settings.ns('max_observation_age_s'),
        frozen_ns=settings.ns('frozen_joints_s'),
    )


def joint_limits(settings: Settings, joints: Sequence[str]) -> JointLimits:
    """Limits for the joints of the contract, mapped by name; unbounded where none are set.

    The first point alone is always bounded: the arm may be anywhere, whatever the policy thinks.

    Raises
    ------
    ParameterError
        for names that are not exactly the contract's, or arrays that do not fit them.

    """
    names = settings['limits.joints']
    given = {key: settings[f'limits.{key}'] or [] for key in _LIMITS}
    if not names and any(given.values()):
        of = [f'limits.{key}' for key, values in given.items() if values]
        raise ParameterError(f'limits.joints: expected the joints that {of} belong to, got none')
    if names and sorted(names) != sorted(joints):
        raise ParameterError(
            f'limits.joints: expected exactly the joints of the bundle {list(joints)}, '
            f'got {list(names)}'
        )
    order = [list(names or joints).index(joint) for joint in joints]
    columns = {}
    for key, default in _LIMITS.items():
        if default is None:
            default = settings['limits.first_point_default']
        column = np.asarray(given[key] or [default] * len(joints), dtype=np.float64)
        if column.shape != (len(joints),) or np.isnan(column).any():
            raise ParameterError(
                f'limits.{key}: expected {len(joints)} numbers, one per limits.joints, '
                f'got {given[key]}'
            )
        if default > 0.0 and key != 'upper' and not (column > 0.0).all():
            raise ParameterError(f'limits.{key}: expected positive numbers, got {given[key]}')
        columns[key] = column[order]
    if not (columns['lower'] < columns['upper']).all():
        raise ParameterError(
            f'limits.lower: expected less than limits.upper for every joint, '
            f'got {given["lower"]} and {given["upper"]}'
        )
    if not np.isfinite(columns['first_point']).all():
        raise ParameterError(
            f'limits.first_point: expected finite numbers, got {given["first_point"]}'
        )
    first_distance = columns.pop('first_point')
    return JointLimits(
        tuple(joints),
        **columns,
        first_distance=first_distance,
        tolerance=settings['limits.tolerance'],
    )
