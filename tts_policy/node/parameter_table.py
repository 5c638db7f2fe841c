# SPDX-License-Identifier: Apache-2.0
"""Every parameter of the node in one table.

LIVE parameters take effect at the next tick. STRUCTURAL ones can be set until configure and are
refused while the node is configured. START ones are read once and are read-only.
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
    _fixed('bundle', Type.STRING, '', '', 'Path of the model bundle, a folder with model.yaml.'),
    _fixed('sampler', Type.STRING, 'ddim10', '', 'Name of the sampler of the bundle to run.'),
    _fixed('device', Type.STRING, 'cpu', '', 'Torch device that runs the policy.'),
    _fixed('engine', Type.STRING, 'auto', '',
           'Engine that runs the denoiser: auto, eager, packed (CPU) or cuda (graphs).'),
    _fixed('threads', Type.INTEGER, 1, '',
           'Number of Torch threads. More than one hurts when another core is busy.', 1, 256),
    _fixed('seed', Type.INTEGER, 0, '',
           'Seed of the noise that an episode keeps.', 0, 2**31 - 1),
    _live('sparsity', Type.DOUBLE, 0.8, '',
          'Share of the denoiser that is reused instead of computed; 0 computes all of it.',
          0.0, 1.0),
    _live('latency_budget_s', Type.DOUBLE, 0.0, 's',
          'While the p95 latency is above this, sparsity is raised, up to what the bundle '
          'recommends. 0 leaves it as set.', 0.0, 60.0),
    _live('n_execute', Type.INTEGER, 0, 'periods',
          'Interval between two chunks. 0 takes that of the bundle.', 0, 1024),
    _live('blend_s', Type.DOUBLE, 0.0, 's',
          'Time in which commands move over from the old chunk to the new one. 0 switches at '
          'once.', 0.0, 10.0),
    _live('hold_committed', Type.STRING, 'none', '',
          'How the new chunk continues the current one. hard: set-points already committed are '
          'held fixed while denoising. soft: later set-points are also pulled towards the current '
          'chunk, less and less.', choices=('none', 'hard', 'soft')),
    _live('enable_output', Type.BOOL, False, '',
          'Publish commands. If false, chunks go to ~/proposed_trajectory (a dry run).'),
    _live('limits_scale', Type.DOUBLE, 1.0, '',
          'Factor on limits.velocity, limits.acceleration and limits.first_point.', 0.01, 1.0),
    _fixed('max_observation_age_s', Type.DOUBLE, 0.25, 's',
           'Input that is older than this gives no chunk.', 0.001, 60.0),
    _fixed('max_position', Type.DOUBLE, 1e6, 'rad or m',
           'A joint state that is further out is refused as not plausible.', 0.001, 1e6),
    _fixed('frozen_joints_s', Type.DOUBLE, 0.3, 's',
           'If all joint states are equal for so long while the arm is commanded to move, it is '
           'held until they differ. 0 does not look.', 0.0, 60.0),
    _fixed('sample_tolerance_s', Type.DOUBLE, 0.0, 's',
           'How far a sample may be from the time it stands for. 0 takes half a period.',
           0.0, 10.0),
    _fixed('max_skew_s', Type.DOUBLE, 0.0, 's',
           'How far apart the samples of one step may be, cameras and joints. 0 sets no bound.',
           0.0, 10.0),
    _fixed('gap_limit_s', Type.DOUBLE, 0.5, 's',
           'A longer gap in the stamps of a topic starts a new episode.', 0.01, 3600.0),
    _fixed('future_limit_s', Type.DOUBLE, 0.1, 's',
           'A message that is stamped further ahead of the clock waits for it.', 0.0, 60.0),
    _fixed('reliable_sensors', Type.BOOL, False, '',
           'Subscribe to sensors with reliable QoS instead of best effort.'),
    _fixed('compressed_cameras', Type.STRING_ARRAY, None, '',
           'Cameras of the bundle that are read from KEY/image/compressed (jpeg or png).'),
    _fixed('image_fit', Type.STRING, 'exact', '',
           'What to do with an image of another size than the model was trained with. exact: '
           'refuse it. resize: scale it. crop: crop it around its centre to the aspect ratio of '
           'the model, then scale it.', choices=('exact', 'resize', 'crop')),
    _fixed('lead_time_s', Type.DOUBLE, 0.01, 's',
           'Time that a command takes to the controller. Points due sooner are dropped.',
           0.0, 1.0),
    _fixed('min_points', Type.INTEGER, 2, '',
           'A chunk with fewer points still to come is a missed deadline and is not sent.',
           1, 1024),
    _fixed('check_latency', Type.BOOL, True, '',
           'Refuse an interval between chunks that, with the measured latency, is longer than a '
           'chunk.'),
    _fixed('inference_timeout_s', Type.DOUBLE, 2.0, 's',
           'If a tick takes longer, the node deactivates itself.', 0.05, 600.0),
    _fixed('emergency_stop_timeout_s', Type.DOUBLE, 0.0, 's',
           'Silence on emergency_stop that closes the output. With 0 only true does.', 0.0, 60.0),
    _fixed('hold_delay_s', Type.DOUBLE, 0.1, 's',
           'Time in which a hold brings the arm to rest.', 0.001, 10.0),
    _fixed('hold_last_command', Type.STRING_ARRAY, None, '',
           'Joints, such as a gripper, that hold their last command instead of their measured '
           'position.'),
    _fixed('output', Type.STRING, 'topic', '',
           'Where commands go: to the topic joint_trajectory or to the action '
           'follow_joint_trajectory.', choices=tuple(ARM_OUTPUTS)),
    _fixed('gripper.joints', Type.STRING_ARRAY, None, '',
           'Joints of the bundle that another controller than the arm\'s moves.'),
    _fixed('gripper.output', Type.STRING, 'joint_trajectory', '',
           'How commands are sent to gripper.joints.', choices=tuple(GRIPPER_OUTPUTS)),
    _fixed('limits.joints', Type.STRING_ARRAY, None, '',
           'Joints that the limits belong to: all of the bundle, in any order.'),
    _fixed('limits.lower', Type.DOUBLE_ARRAY, None, 'rad or m', 'Lowest position of each joint.'),
    _fixed('limits.upper', Type.DOUBLE_ARRAY, None, 'rad or m', 'Highest position of each joint.'),
    _fixed('limits.velocity', Type.DOUBLE_ARRAY, None, 'rad/s or m/s',
           'Highest speed of each joint between two set-points.'),
    _fixed('limits.acceleration', Type.DOUBLE_ARRAY, None, 'rad/s^2 or m/s^2',
           'Highest change of that speed of each joint.'),
    _fixed('limits.first_point', Type.DOUBLE_ARRAY, None, 'rad or m',
           'Longest way of each joint from its measured position to the first point.'),
    _fixed('limits.first_point_default', Type.DOUBLE, 0.5, 'rad or m',
           'The same for every joint while limits.first_point is empty.', 0.001, 1000.0),
    _fixed('limits.tolerance', Type.DOUBLE, 0.02, '',
           'Share by which a chunk may exceed a limit. Positions are clipped to the limit.',
           0.0, 0.5),
    _fixed('limits.allow_unbounded', Type.BOOL, False, '',
           'Let commands out although joints have no bound of position or velocity. '
           '/diagnostics warns as long as that is so.'),
    _fixed('limits.urdf', Type.STRING, 'when_present', '',
           'How the limits in robot_description are used. off: not at all. when_present: they '
           'tighten these. required: nothing is commanded before they are known for every joint '
           'but gripper.joints.', choices=('off', 'when_present', 'required')),
    _row(Change.START, 'autostart', Type.BOOL, False, '',
         'Configure and activate the node when it starts.'),
)
# fmt: on
