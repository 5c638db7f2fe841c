# SPDX-License-Identifier: Apache-2.0
"""Messages of a recording to samples of a policy's contract, as the live node converts them.

A message that does not fit is refused and counted, as in the node. Stamps are header stamps, in
nanoseconds of the clock that made them. rosbags decodes the messages, so no ROS installation is
needed; they have the fields of those of rclpy, so live and recorded ones are read alike.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rosbags.interfaces import MessageDefinitionFormat
from rosbags.serde import SerdeError
from rosbags.typesys import (
    Stores,
    TypesysError,
    get_types_from_idl,
    get_types_from_msg,
    get_typestore,
)

from tts_policy.control.conversions import (
    ConversionError,
    holds_positions_of_any,
    joint_positions,
    time_to_ns,
)
from tts_policy.control.images import ImageFit, compressed_to_rgb, raw_to_rgb
from tts_policy.data.reader import BagError, BagReader, RawMessage
from tts_policy.data.samples import Command, Sample
from tts_policy.policy.contract import PolicyContract

IMAGE = 'sensor_msgs/msg/Image'
COMPRESSED_IMAGE = 'sensor_msgs/msg/CompressedImage'
JOINT_STATE = 'sensor_msgs/msg/JointState'
JOINT_TRAJECTORY = 'trajectory_msgs/msg/JointTrajectory'
_BIG_ENDIAN, _LITTLE_ENDIAN = b'\0\0', b'\0\1'

Decode = Callable[[RawMessage], Any]


@dataclass(frozen=True)
class Topics:
    """Topic of every stream of the contract; without commands the reference is what was measured.

    cut: a topic each of whose messages begins a new episode.
    """

    cameras: dict[str, str]
    joints: str = '/joint_states'
    commands: str | None = '/joint_trajectory'
    cut: str | None = None

    @staticmethod
    def of(contract: PolicyContract, remap: dict[str, str] | None = None) -> Topics:
        """Topics of the node, absolute; `remap` gives others by camera key or stream name.

        Raises
        ------
        BagError
            for a name that is no camera of the contract, nor joints, commands or cut.

        """
        remap = remap or {}
        cameras = {c.key: f'/{c.key}/image' for c in contract.observation.cameras}
        known = {*cameras, 'joints', 'commands', 'cut'}
        if set(remap) - known:
            raise BagError(f'topics: expected {sorted(known)}, got {sorted(set(remap) - known)}')
        return Topics(
            {key: remap.get(key, topic) for key, topic in cameras.items()},
            remap.get('joints', '/joint_states'),
            remap.get('commands', '/joint_trajectory') or None,
            remap.get('cut') or None,
        )


def parse_pairs(pairs: Sequence[str], thing: str, expected: str) -> dict[str, str]:
    """Map left to right sides of FROM:=TO; raises BagError for anything else."""
    parsed = {}
    for pair in pairs:
        left, separator, right = pair.partition(':=')
        if not separator or not left:
            raise BagError(f'{thing}: expected {expected}, got {pair!r}')
        parsed[left] = right
    return parsed


def add_topic_argument(parser: argparse.ArgumentParser) -> None:
    """Add --topic STREAM:=TOPIC, which may be given several times."""
    parser.add_argument(
        '--topic',
        action='append',
        default=[],
        metavar='STREAM:=TOPIC',
        help='recorded topic of a camera key, of joints or of commands (empty for none), or a '
        'topic each of whose messages begins an episode, as cut',
    )


def add_image_fit_argument(parser: argparse.ArgumentParser) -> None:
    """Add --image-fit, the node's parameter of that name."""
    parser.add_argument(
        '--image-fit',
        choices=[fit.value for fit in ImageFit],
        default=ImageFit.EXACT.value,
        help='images of another size than the contract: refused, scaled, or cropped and scaled '
        '(default: %(default)s)',
    )


def make_decoder(reader: BagReader, topics: list[str]) -> Decode:
    """Return a decoder for the messages on these topics of a bag.

    Raises
    ------
    BagError
        if a topic has a type that is neither known nor defined in the bag. The decoder raises it
        for bytes that are not a message of their type.

    """
    types = {reader.topics[topic].msgtype for topic in topics}
    store = get_typestore(Stores.ROS2_JAZZY)
    try:
        for msgtype in sorted(types - set(store.fielddefs)):
            definition = reader.definitions.get(msgtype)
            if definition is None or definition.format is MessageDefinitionFormat.NONE:
                raise BagError(
                    f'{reader.path}: type {msgtype!r}: expected a standard one or a definition in '
                    'the bag, got neither'
                )
            if definition.format is MessageDefinitionFormat.MSG:
                found = get_types_from_msg(definition.data, msgtype)
            else:
                found = get_types_from_idl(definition.data)
            store.register({n: t for n, t in found.items() if n not in store.fielddefs})
    except TypesysError as error:
        raise BagError(
            f'{reader.path}: type {msgtype!r}: {" ".join(str(error).split())}'
        ) from None

    def decode(message: RawMessage) -> Any:
        data = memoryview(message.data)
        definition = store.get_msgdef(message.msgtype)
        readers = {
            _BIG_ENDIAN: definition.deserialize_cdr_be,
            _LITTLE_ENDIAN: definition.deserialize_cdr_le,
        }
        try:
            # Bytes after the message are ignored, as rclpy ignores them: Fast CDR reserves room
            # for every empty sequence and does not give it back.
            read = readers[bytes(data[:2])]
            return read(data[4:], 0, definition.cls, store)[0]
        except (SerdeError, struct.error, ValueError, IndexError, KeyError) as error:
            raise _undecodable(reader, message, error) from None

    return decode


def _undecodable(reader: BagReader, message: RawMessage, error: Exception) -> BagError:
    return BagError(
        f'{reader.path}: {message.topic}: expected a {message.msgtype}, '
        f'got {len(message.data)} bytes that are not one: {" ".join(str(error).split())}'
    )


@dataclass
class Refusals:
    """Messages of one topic that did not fit, and why the first one did not."""

    reason: str
    count: int = 0


@dataclass
class SampleReader:
    """Samples of one bag; topics are checked when it is made.

    fit: what is done with images of another size than the contract's, as the node's `image_fit`.

    Raises
    ------
    BagError
        if a topic is absent, empty or of a type that cannot be converted.

    """

    bag: BagReader
    contract: PolicyContract
    topics: Topics
    fit: ImageFit = ImageFit.EXACT
    refused: dict[str, Refusals] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check topics and types, and prepare decoding."""
        self._joints_seen = False
        self._foreign: Refusals | None = None
        observation = self.contract.observation
        self._camera_of = {topic: key for key, topic in self.topics.cameras.items()}
        self._size = {c.key: (c.height, c.width) for c in observation.cameras}
        self._names = list(dict.fromkeys((*observation.joints, *self.contract.action.joints)))
        self._acted = [self._names.index(name) for name in self.contract.action.joints]
        cameras = {topic: {IMAGE, COMPRESSED_IMAGE} for topic in self._camera_of}
        joints = {self.topics.joints: {JOINT_STATE}}
        for expected in (cameras, joints):
            self._check(expected, optional=False)
        self.has_commands = self.topics.commands in self.bag.topics
        optional: dict[str, set[str]] = {}
        if self.has_commands and self.topics.commands is not None:
            optional[self.topics.commands] = {JOINT_TRAJECTORY}
        self._check(optional, optional=True)
        self._wanted = [*cameras, *joints, *optional]
        self._decode = make_decoder(self.bag, self._wanted)
        if self.topics.cut is not None:
            if self.topics.cut not in self.bag.topics:
                raise BagError(
                    f'{self.bag.path}: expected topic {self.topics.cut!r}, '
                    f'got {sorted(self.bag.topics)}'
                )
            self._wanted.append(self.topics.cut)

    def _check(self, expected: dict[str, set[str]], optional: bool) -> None:
        found = self.bag.topics
        absent = sorted(set(expected) - set(found))
        if absent:
            raise BagError(f'{self.bag.path}: expected topics {absent}, got {sorted(found)}')
        for topic, types in expected.items():
            if found[topic].msgtype not in types:
                raise BagError(
                    f'{self.bag.path}: {topic}: expected {" or ".join(sorted(types))}, '
                    f'got {found[topic].msgtype}'
                )
            if found[topic].count == 0 and not optional:
                raise BagError(f'{self.bag.path}: {topic}: expected messages, got none')

    def __iter__(self) -> Iterator[Sample]:
        """Samples in the order in which they were received; BagError where the bag is damaged."""
        for raw in self.bag.messages(self._wanted):
            sample = self.convert(raw)
            if sample is not None:
                yield sample

    @property
    def name(self) -> str:
        """Where the bag lies."""
        return str(self.bag.path)

    def problems(self) -> list[str]:
        """Messages that did not fit, a line for every topic.

        Joint states of other devices are no problem, unless there were no others.
        """
        refused = list(self.refused.values())
        if self._foreign is not None and not self._joints_seen:
            refused.append(self._foreign)
        return [
            f'{self.name}: {one.count} messages do not fit, the first: {one.reason}'
            for one in refused
        ]

    def convert(self, raw: RawMessage) -> Sample | None:
        """Sample of one message; None if it does not fit, which is counted, or is not ours."""
        try:
            return self._convert(raw)
        except ConversionError as error:
            refusals = self.refused.setdefault(raw.topic, Refusals(str(error)))
            refusals.count += 1
            return None

    def _convert(self, raw: RawMessage) -> Sample | None:
        topic = raw.topic
        if topic == self.topics.cut:
            return Sample('cut', raw.received_ns, raw.received_ns)
        msg = self._decode(raw)
        stamp_ns = time_to_ns(msg.header.stamp)
        if topic in self._camera_of:
            key = self._camera_of[topic]
            convert = raw_to_rgb if raw.msgtype == IMAGE else compressed_to_rgb
            image = convert(msg, *self._size[key], topic, self.fit)
            return Sample(key, stamp_ns, raw.received_ns, image)
        if topic == self.topics.joints:
            if not holds_positions_of_any(msg, self._names):
                self._foreign = self._foreign or Refusals(
                    f'{topic}: expected positions of {list(self._names)}, got '
                    f'{len(msg.position)} of {list(msg.name)}'
                )
                self._foreign.count += 1
                return None
            self._joints_seen = True
            values = joint_positions(msg, self._names, topic)
            observed = values[: len(self.contract.observation.joints)]
            return Sample('joints', stamp_ns, raw.received_ns, observed, values[self._acted])
        # A controller takes a stamp of zero as now.
        start_ns = stamp_ns or raw.received_ns
        command = self._command(msg, start_ns, topic)
        return Sample('commands', start_ns, raw.received_ns, command=command)

    def _command(self, msg: Any, start_ns: int, topic: str) -> Command:
        names, joints = list(msg.joint_names), self.contract.action.joints
        missing = [name for name in joints if name not in names]
        if missing or not msg.points:
            raise ConversionError(
                f'{topic}: expected set-points of {list(joints)}, got {len(msg.points)} of {names}'
            )
        if any(len(point.positions) != len(names) for point in msg.points):
            raise ConversionError(f'{topic}: expected one position per joint in every point')
        order = [names.index(name) for name in joints]
        due = [time_to_ns(point.time_from_start) for point in msg.points]
        positions = np.array([np.asarray(p.positions, np.float64)[order] for p in msg.points])
        if not np.isfinite(positions).all():
            raise ConversionError(f'{topic}: expected finite set-points')
        return Command(start_ns + np.asarray(due, np.int64), positions)
