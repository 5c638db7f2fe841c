# SPDX-License-Identifier: Apache-2.0
"""Every topic and service of the node: names, types, QoS and what they are for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Bool, Float64MultiArray, String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# Best effort takes from every kind of publisher; `reliable_sensors` asks for reliable.
SENSOR_QOS = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
RELIABLE_SENSOR_QOS = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
COMMAND_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
# Every message counts: a true that a heartbeat follows at once must not be overwritten by it.
STOP_QOS = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
# A reliable subscription hears no best-effort publisher: a second one does.
BEST_EFFORT_STOP_QOS = QoSProfile(depth=100, reliability=ReliabilityPolicy.BEST_EFFORT)
REPORT_QOS = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
DIAGNOSTICS_QOS = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
LATCHED_QOS = QoSProfile(
    depth=1,
    reliability=ReliabilityPolicy.RELIABLE,
    durability=DurabilityPolicy.TRANSIENT_LOCAL,
)
# A transient-local subscription hears no volatile publisher: a second one does.
VOLATILE_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)


class Direction(Enum):
    """Which way the messages go."""

    IN = 'in'
    OUT = 'out'
    SERVICE = 'service'


@dataclass(frozen=True)
class Endpoint:
    """One topic or service: relative to the namespace, or private to the node with `~/`."""

    name: str
    kind: type
    direction: Direction
    qos: QoSProfile | None
    description: str


def _topic(direction: Direction, name: str, kind: type, qos: QoSProfile, text: str) -> Endpoint:
    return Endpoint(name, kind, direction, qos, text)


def camera_topic(key: str) -> str:
    """Relative topic of the camera of that key."""
    return IMAGE.name.replace('KEY', key)


def compressed_topic(key: str) -> str:
    """Relative topic of the camera of that key where it comes compressed."""
    return COMPRESSED_IMAGE.name.replace('KEY', key)


IMAGE = _topic(
    Direction.IN, 'KEY/image', Image, SENSOR_QOS,
    'images of the camera that the bundle calls KEY: rgb8, bgr8, rgba8, bgra8 or mono8',
)  # fmt: skip
COMPRESSED_IMAGE = _topic(
    Direction.IN, 'KEY/image/compressed', CompressedImage, SENSOR_QOS,
    'the same as jpeg or png, for `compressed_cameras`',
)  # fmt: skip
JOINT_STATES = _topic(
    Direction.IN, 'joint_states', JointState, SENSOR_QOS,
    'measured positions; joints are found by name, in any order',
)  # fmt: skip
EMERGENCY_STOP = _topic(
    Direction.IN, 'emergency_stop', Bool, STOP_QOS,
    'true closes the output until ~/clear_stop is called; so does silence if a timeout is set. '
    'Publishers may be reliable or best effort',
)  # fmt: skip
ROBOT_DESCRIPTION = _topic(
    Direction.IN, 'robot_description', String, LATCHED_QOS,
    'URDF whose limits tighten those of the parameters (see `limits.urdf`). Publishers may be '
    'latched or volatile',
)  # fmt: skip
JOINT_TRAJECTORY = _topic(
    Direction.OUT, 'joint_trajectory', JointTrajectory, COMMAND_QOS,
    'a chunk every tick while the output is open; one point at rest when it closes',
)  # fmt: skip
GRIPPER_TRAJECTORY = _topic(
    Direction.OUT, 'gripper/joint_trajectory', JointTrajectory, COMMAND_QOS,
    'commands of `gripper.joints` if `gripper.output` is joint_trajectory',
)  # fmt: skip
GRIPPER_COMMANDS = _topic(
    Direction.OUT, 'gripper/commands', Float64MultiArray, COMMAND_QOS,
    'set-points of `gripper.joints` every period if `gripper.output` is float64_multi_array',
)  # fmt: skip
PROPOSED_TRAJECTORY = _topic(
    Direction.OUT, '~/proposed_trajectory', JointTrajectory, COMMAND_QOS,
    'the chunk of all joints while the output is closed: a dry run',
)  # fmt: skip
CHUNK_STATS = _topic(
    Direction.OUT, '~/chunk_stats', String, REPORT_QOS,
    'statistics of every tick as JSON, with the plan',
)  # fmt: skip
PLAN_IMAGE = _topic(
    Direction.OUT, '~/plan_image', Image, COMMAND_QOS,
    'the plan as a picture, a row per denoising step; published while somebody subscribes',
)  # fmt: skip
DIAGNOSTICS = _topic(
    Direction.OUT, '/diagnostics', DiagnosticArray, DIAGNOSTICS_QOS,
    'state, faults, latency, ages, sparsity and reuse, once a second',
)  # fmt: skip
RESET = Endpoint(
    '~/reset', Trigger, Direction.SERVICE, None,
    'begin a new episode: the policy forgets every cached feature',
)  # fmt: skip
CLEAR_STOP = Endpoint(
    '~/clear_stop', Trigger, Direction.SERVICE, None,
    'open the output that an emergency stop closed; refused while the cause lasts',
)  # fmt: skip

ENDPOINTS = (
    IMAGE,
    COMPRESSED_IMAGE,
    JOINT_STATES,
    EMERGENCY_STOP,
    ROBOT_DESCRIPTION,
    JOINT_TRAJECTORY,
    GRIPPER_TRAJECTORY,
    GRIPPER_COMMANDS,
    PROPOSED_TRAJECTORY,
    CHUNK_STATS,
    PLAN_IMAGE,
    DIAGNOSTICS,
    RESET,
    CLEAR_STOP,
)


@dataclass(frozen=True)
class ReplayedTopics:
    """What is played of a recording for a policy: `topics`, some of them `moved` to other names.

    `cameras` are the recorded topics of the cameras whose names differ from the node's own.
    """

    topics: list[str]
    moved: dict[str, str]
    cameras: dict[str, str]


def replayed_topics(
    recorded: Iterable[str],
    cameras: Iterable[str],
    namespace: str = '',
    remappings: Mapping[str, str] | None = None,
    requested: Sequence[str] = (),
) -> ReplayedTopics:
    """Play what the policy subscribes to, or what is requested; nothing that could move an arm.

    A requested topic that the policy does not subscribe to, a recorded command above all, is
    played below /recorded, where no controller listens. `remappings` are those of the policy.
    """
    root = f'/{namespace.strip("/")}' if namespace.strip('/') else ''

    def resolved(name: str) -> str:
        name = (remappings or {}).get(name, name)
        return name if name.startswith('/') else f'{root}/{name}'

    heard = {
        resolved(endpoint.name.replace('KEY', key))
        for endpoint in ENDPOINTS
        if endpoint.direction is Direction.IN
        for key in cameras
    }
    topics = list(requested) or sorted(heard & set(recorded))
    moved = {topic: f'/recorded{topic}' for topic in topics if topic not in heard}
    renamed = {
        key: resolved(name)
        for key in cameras
        for name in (camera_topic(key), compressed_topic(key))
        if resolved(name) != f'{root}/{name}' and resolved(name) in topics
    }
    return ReplayedTopics(topics, moved, renamed)
