# SPDX-License-Identifier: Apache-2.0
"""Every parameter of the node in one table.

LIVE parameters take effect at the next tick. STRUCTURAL ones may be set until configure and are
refused, with the reason, while the node is configured. START ones are read once and are read-only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.parameter import Parameter

from tts_policy.node.outputs import ARM_OUTPUTS, GRIPPER_OUTPUTS

Type = Parameter.Type


class Change(Enum):
    """When a parameter may be changed."""

    LIVE = 'live'
    STRUCTURAL = 'fixed while configured'
    START = 'read-only'


@dataclass(frozen=True)
class ParameterSpec:
    """One row; an array without a default is empty until somebody sets it."""

    name: str
    type: Parameter.Type
    default: Any
    change: Change
    unit: str
    description: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def range_text(self) -> str:
        """Range or choices, empty where everything of the type goes."""
        if self.choices:
            return ', '.join(repr(choice) for choice in self.choices)
        return '' if self.low is None else f'[{self.low}, {self.high}]'

    @property
    def default_text(self) -> str:
        """Default as in a parameter file."""
        if self.default is None:
            return '[]'
        return str(self.default).lower() if isinstance(self.default, bool) else repr(self.default)

    @property
    def expected(self) -> str:
        """Type and range, for an error message."""
        span = f' in [{self.low}, {self.high}]' if self.low is not None else ''
        return f'one of {self.range_text}' if self.choices else f'{self.type.name.lower()}{span}'

    def descriptor(self) -> ParameterDescriptor:
        """ROS descriptor: text with unit and change rule, range where there is one."""
        unit = f' [{self.unit}]' if self.unit else ''
        descriptor = ParameterDescriptor(
            name=self.name,
            type=self.type.value,
            description=f'{self.description}{unit} ({self.change.value})',
            additional_constraints=f'one of {self.range_text}' if self.choices else '',
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
    change: Change, name: str, kind: Parameter.Type, default: Any, *rest: Any, **choices: Any
) -> ParameterSpec:
    unit, description, *span = rest
    return ParameterSpec(name, kind, default, change, unit, description, *span, **choices)


_live = partial(_row, Change.LIVE)
_fixed = partial(_row, Change.STRUCTURAL)

# fmt: off
PARAMETERS: tuple[ParameterSpec, ...] = (
    _fixed('bundle', Type.STRING, '', '', 'Path of the model bundle, a folder with model.yaml'),
    _fixed('sampler', Type.STRING, 'ddim10', '', 'Sampler of the bundle to run'),
    _fixed('device', Type.STRING, 'cpu', '', 'Torch device'),
    _fixed('engine', Type.STRING, 'auto', '',
           'What runs the denoiser: auto, eager, packed (CPU) or cuda (graphs, unmeasured)'),
    _fixed('threads', Type.INTEGER, 1, '',
           'Torch threads; more than one hurts beside a busy core', 1, 256),
    _fixed('seed', Type.INTEGER, 0, '',
           'Seed of the noise held within an episode', 0, 2**31 - 1),
    _live('sparsity', Type.DOUBLE, 0.8, '',
          'Share of the plan that is reused; 0 is dense', 0.0, 1.0),
    _live('latency_budget_s', Type.DOUBLE, 0.0, 's',
          'Raise the sparsity, up to what the bundle recommends, while the p95 latency is above '
          'this; 0 leaves it as set', 0.0, 60.0),
    _live('n_execute', Type.INTEGER, 0, 'periods',
          'Replan interval; 0 takes the one of the bundle', 0, 1024),
    _live('blend_s', Type.DOUBLE, 0.0, 's',
          'Lead from the old chunk over to the new one within this time; 0 switches at once',
          0.0, 10.0),
    _live('hold_committed', Type.STRING, 'none', '',
          'Denoise with the set-points held that the arm follows until the chunk comes '
          '(hard), and with the rest of the old chunk drawing ever less too (soft)',
          choices=('none', 'hard', 'soft')),
    _live('enable_output', Type.BOOL, False, '',
          'Publish on joint_trajectory; otherwise on ~/proposed_trajectory'),
    _live('limits_scale', Type.DOUBLE, 1.0, '',
          'Share of limits.velocity, acceleration and first_point that is allowed', 0.01, 1.0),
    _fixed('max_observation_age_s', Type.DOUBLE, 0.25, 's',
           'Older input gives no chunk', 0.001, 60.0),
    _fixed('sample_tolerance_s', Type.DOUBLE, 0.0, 's',
           'Largest distance of a sample from its time; 0 takes half a period', 0.0, 10.0),
    _fixed('max_skew_s', Type.DOUBLE, 0.0, 's',
           'Largest distance between the samples of one step, cameras and joints; 0 sets none',
           0.0, 10.0),
    _fixed('gap_limit_s', Type.DOUBLE, 0.5, 's',
           'A longer gap in the stamps of a topic resets the policy', 0.01, 3600.0),
    _fixed('future_limit_s', Type.DOUBLE, 0.1, 's',
           'A message stamped further ahead of the clock waits for it', 0.0, 60.0),
    _fixed('reliable_sensors', Type.BOOL, False, '',
           'Subscribe to the sensors with reliable instead of best-effort QoS'),
    _fixed('compressed_cameras', Type.STRING_ARRAY, None, '',
           'Cameras of the bundle that come as KEY/image/compressed (jpeg or png)'),
    _fixed('image_fit', Type.STRING, 'exact', '',
           'An image of another size than the model was trained with is refused (exact), scaled '
           '(resize), or cropped around its centre to that aspect ratio and scaled (crop)',
           choices=('exact', 'resize', 'crop')),
    _fixed('lead_time_s', Type.DOUBLE, 0.01, 's',
           'Time a command takes to the controller: points due sooner are dropped', 0.0, 1.0),
    _fixed('min_points', Type.INTEGER, 2, '',
           'A chunk with fewer points still to come is a missed deadline and is not sent',
           1, 1024),
    _fixed('check_latency', Type.BOOL, True, '',
           'Refuse a replan interval that, with the measured latency, exceeds the usable actions'),
    _fixed('inference_timeout_s', Type.DOUBLE, 2.0, 's',
           'An inference that takes longer deactivates the node', 0.05, 600.0),
    _fixed('emergency_stop_timeout_s', Type.DOUBLE, 0.0, 's',
           'Silence on emergency_stop that closes the gate; 0 waits for true only', 0.0, 60.0),
    _fixed('hold_delay_s', Type.DOUBLE, 0.1, 's',
           'Time until a hold-position point is due', 0.001, 10.0),
    _fixed('hold_last_command', Type.STRING_ARRAY, None, '',
           'Joints (a gripper) that hold the last command instead of the measured position'),
    _fixed('output', Type.STRING, 'topic', '',
           'Where commands go: joint_trajectory, or the action follow_joint_trajectory',
           choices=tuple(ARM_OUTPUTS)),
    _fixed('gripper.joints', Type.STRING_ARRAY, None, '',
           'Joints of the bundle that are not the arm controller\'s'),
    _fixed('gripper.output', Type.STRING, 'joint_trajectory', '',
           'What the gripper\'s joints are sent as',
           choices=tuple(GRIPPER_OUTPUTS)),
    _fixed('limits.joints', Type.STRING_ARRAY, None, '',
           'Joints the limits belong to: all of the bundle, in any order'),
    _fixed('limits.lower', Type.DOUBLE_ARRAY, None, 'rad or m', 'Lowest position per joint'),
    _fixed('limits.upper', Type.DOUBLE_ARRAY, None, 'rad or m', 'Highest position per joint'),
    _fixed('limits.velocity', Type.DOUBLE_ARRAY, None, 'rad/s or m/s',
           'Highest speed between two set-points per joint'),
    _fixed('limits.acceleration', Type.DOUBLE_ARRAY, None, 'rad/s^2 or m/s^2',
           'Highest change of that speed per joint'),
    _fixed('limits.first_point', Type.DOUBLE_ARRAY, None, 'rad or m',
           'Longest way from the measured state to the first point per joint'),
    _fixed('limits.first_point_default', Type.DOUBLE, 0.5, 'rad or m',
           'The same for every joint while limits.first_point is empty', 0.001, 1000.0),
    _fixed('limits.tolerance', Type.DOUBLE, 0.02, '',
           'Share of a bound by which it may be exceeded; positions are clipped', 0.0, 0.5),
    _fixed('limits.urdf', Type.STRING, 'when_present', '',
           'Whether the limits of robot_description count: off, when one is present, or required, '
           'for every joint but gripper.joints, before anything is commanded',
           choices=('off', 'when_present', 'required')),
    _row(Change.START, 'autostart', Type.BOOL, False, '',
         'Configure and activate without being asked'),
)
# fmt: on
