# SPDX-License-Identifier: Apache-2.0
"""A node that writes what it hears to a rosbag2 recording: the bytes of messages as they came.

A topic is asked for as its publishers offer it: best effort as soon as one of them does. Messages
are stamped with the time at which they arrived, or with /clock under use_sim_time. Memory is
bounded: the middleware keeps `queue` messages a topic, the writer one chunk of a megabyte. Chunks
end every second at least, so that a killed recorder leaves what `mcap recover` can read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rclpy.clock import Clock, ClockType
from rclpy.event_handler import SubscriptionEventCallbacks, UnsupportedEventTypeError
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rosbags.interfaces import (
    Connection,
    Qos,
    QosDurability,
    QosHistory,
    QosLiveliness,
    QosReliability,
    QosTime,
)
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.rosbag2.storage_mcap import McapWriter
from rosbags.typesys import Stores, get_typestore

from tts_policy.data.reader import BagError
from tts_policy.node.message_types import message_class, typestore_with
from tts_policy.node.player import resolved_topic_name

DISCOVERY_S = 0.1
# At the end, what has arrived is still written, for so long at most.
DRAIN_S = 2.0
# What is recorded reaches the file after this time, so that a kill loses no more.
FLUSH_S = 1.0
_FOREVER = QosTime(2**31 - 1, 2**32 - 1)


@dataclass(frozen=True)
class RecorderSpec:
    """What is recorded: topics None records all that are not hidden, but those in `exclude`."""

    topics: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    queue: int = 100
    compress: bool = False


@dataclass
class _Track:
    """One topic that is recorded."""

    kind: Any
    connection: Connection
    qos: QoSProfile
    subscription: Any
    messages: int = 0
    lost: int = 0


class BagRecorder(Node):
    """Subscriptions to the topics of a recording, and its writer."""

    def __init__(self, out: Path, spec: RecorderSpec) -> None:
        """Begin a recording in the new folder `out`; raises BagError if there is one already."""
        super().__init__('record_bag')
        if out.exists():
            raise BagError(f'{out}: expected a new folder, got one that exists')
        self._spec, self._store = spec, get_typestore(Stores.ROS2_JAZZY)
        self._wanted = self._resolved(spec.topics)
        self._excluded = self._resolved(spec.exclude) or set()
        self._tracks: dict[str, _Track] = {}
        self._left_out: set[str] = set()
        self.messages = self.bytes = 0
        self._writer = Writer(out, version=9, storage_plugin=StoragePlugin.MCAP)
        if spec.compress:
            self._writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
        out.parent.mkdir(parents=True, exist_ok=True)
        self._writer.open()
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self)
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(DISCOVERY_S, self._discover, clock=steady)
        self._discover()

    def _resolved(self, topics: Sequence[str] | None) -> set[str] | None:
        return None if topics is None else {resolved_topic_name(self, name) for name in topics}

    def _is_wanted(self, topic: str) -> bool:
        if topic in self._excluded or topic in self._left_out:
            return False
        if self._wanted is not None:
            return topic in self._wanted
        return not any(part.startswith('_') for part in topic.split('/'))

    def _discover(self) -> None:
        """Subscribe to new topics, and again where the publishers offer another QoS now."""
        for topic, kinds in self.get_topic_names_and_types():
            if not self._is_wanted(topic):
                continue
            offered = [info.qos_profile for info in self.get_publishers_info_by_topic(topic)]
            if not offered:
                continue
            track = self._tracks.get(topic)
            if track is None:
                self._begin(topic, kinds, offered)
            elif (qos := self._asked(offered)) != track.qos:
                self.destroy_subscription(track.subscription)
                track.qos, track.subscription = qos, self._subscribe(topic, track.kind, qos)

    def _asked(self, offered: Sequence[QoSProfile]) -> QoSProfile:
        """QoS that hears every one of the publishers."""
        reliable = all(qos.reliability is ReliabilityPolicy.RELIABLE for qos in offered)
        latched = all(qos.durability is DurabilityPolicy.TRANSIENT_LOCAL for qos in offered)
        return QoSProfile(
            depth=self._spec.queue,
            reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
            durability=(
                DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE
            ),
        )

    def _begin(self, topic: str, kinds: Sequence[str], offered: Sequence[QoSProfile]) -> None:
        try:
            if len(kinds) != 1:
                raise ImportError(f'expected one type, got {sorted(kinds)}')
            kind = message_class(kinds[0])
            typestore_with(kinds[0], self._store)
        except ImportError as error:
            self._left_out.add(topic)
            self.get_logger().warning(f'{topic} is left out: {error}')
            return
        connection = self._writer.add_connection(
            topic,
            kinds[0],
            typestore=self._store,
            offered_qos_profiles=[_recorded_qos(qos) for qos in offered],
        )
        qos = self._asked(offered)
        self._tracks[topic] = _Track(kind, connection, qos, None)
        self._tracks[topic].subscription = self._subscribe(topic, kind, qos)

    def _subscribe(self, topic: str, kind: Any, qos: QoSProfile) -> Any:
        track = self._tracks[topic]

        def on_message(data: bytes, info: dict[str, int]) -> None:
            self._write(track, data, info)

        def on_lost(status: Any) -> None:
            track.lost += status.total_count_change

        try:
            events = SubscriptionEventCallbacks(message_lost=on_lost)
            return self.create_subscription(
                kind, topic, on_message, qos, raw=True, event_callbacks=events
            )
        except UnsupportedEventTypeError:
            return self.create_subscription(kind, topic, on_message, qos, raw=True)

    def _write(self, track: _Track, data: bytes, info: dict[str, int]) -> None:
        clock = self.get_clock()
        if clock.ros_time_is_active:
            now_ns = clock.now().nanoseconds
        else:
            now_ns = info.get('received_timestamp') or time.time_ns()
        self._writer.write(track.connection, now_ns, data)
        track.messages += 1
        self.messages += 1
        self.bytes += len(data)

    def record(self, stopped: Callable[[], bool], progress: Callable[[], None]) -> None:
        """Record until `stopped`, then write what has arrived; `progress` is called now and then.

        Raises
        ------
        OSError
            if the recording cannot be written.

        """
        flushed_s = time.monotonic()
        while not stopped():
            self._executor.spin_once(timeout_sec=DISCOVERY_S)
            if time.monotonic() >= flushed_s + FLUSH_S:
                self._flush()
                flushed_s = time.monotonic()
            progress()
        end_s = time.monotonic() + DRAIN_S
        before = -1
        while self.messages > before and time.monotonic() < end_s:
            before = self.messages
            for _ in range(2 * len(self._tracks) + 2):
                self._executor.spin_once(timeout_sec=0.0)

    def _flush(self) -> None:
        """End the chunk that is being filled and hand it to the operating system."""
        storage = self._writer.storage
        if isinstance(storage, McapWriter) and storage.chunk.msgs:
            storage.close_chunk()
            storage.bio.flush()

    def shortcomings(self) -> list[str]:
        """One line for every topic that was asked for and not heard, or lost messages."""
        lines = [
            f'{topic}: {track.lost} messages lost'
            for topic, track in sorted(self._tracks.items())
            if track.lost
        ]
        for topic in sorted(self._wanted or ()):
            if topic not in self._tracks or not self._tracks[topic].messages:
                lines.append(f'{topic}: expected messages, got none')
        return lines if self.messages else lines or ['topics: expected messages, got none']

    def close(self) -> None:
        """Write the index of the recording and free the node."""
        try:
            self._writer.close()
        finally:
            self._executor.shutdown()
            self.destroy_node()


def _recorded_qos(qos: QoSProfile) -> Qos:
    return Qos(
        QosHistory[qos.history.name],
        qos.depth,
        QosReliability[qos.reliability.name],
        QosDurability[qos.durability.name],
        _FOREVER,
        _FOREVER,
        QosLiveliness.AUTOMATIC,
        _FOREVER,
        False,
    )
