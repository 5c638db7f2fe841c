# SPDX-License-Identifier: Apache-2.0
"""A node that publishes a recording: recorded bytes on topics, and the time on /clock.

In paced playing /clock follows the times at which messages were received, at a rate; in lockstep
(`tts_policy.node.lockstep`) it follows the header stamps, and waits for the policy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from lifecycle_msgs.msg import State
from lifecycle_msgs.srv import GetState
from rclpy.duration import Duration
from rclpy.exceptions import InvalidTopicNameException
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.validate_topic_name import validate_topic_name
from rosgraph_msgs.msg import Clock
from std_srvs.srv import Trigger

from tts_policy.data.reader import BagError, BagReader, RawMessage
from tts_policy.node.message_types import message_class
from tts_policy.node.messages import ns_to_time

CLOCK_TOPIC = '/clock'
_ACTIVE = State.PRIMARY_STATE_ACTIVE
# Shortest nap between two looks at the services while nothing is due.
NAP_S = 0.02
# Messages of a topic that may be on their way, and how long its end waits for the last of them.
QUEUE = 100
DELIVERY_S = 2.0
# How long a paced playback waits for somebody who listens; a player that starts finds them late.
DISCOVERY_S = 2.0


@dataclass(frozen=True)
class PlayerSpec:
    """What is played and how: topics None plays all; remap renames topics.

    start_offset_s skips the beginning; clock_hz 0 publishes no clock. `listener` names a running
    node: topics that it publishes itself are not played.
    """

    topics: tuple[str, ...] | None = None
    remap: dict[str, str] = field(default_factory=dict)
    rate: float = 1.0
    loop: bool = False
    start_offset_s: float = 0.0
    clock_hz: float = 100.0
    paused: bool = False
    listener: str | None = None


class Stopped(Exception):
    """Somebody asked to stop."""


def resolved_topic_name(node: Node, name: str) -> str:
    """Absolute name of a topic that may be relative to the node's namespace, or a BagError."""
    try:
        validate_topic_name(name)
    except InvalidTopicNameException as error:
        raise BagError(' '.join(str(error).split())) from None
    return node.resolve_topic_name(name)


class BagPlayer(Node):
    """Publishers of one recording, its clock, and the services ~/pause and ~/resume."""

    def __init__(self, bag: BagReader, spec: PlayerSpec) -> None:
        """Create a publisher per topic; raises BagError if there is none to publish."""
        super().__init__('play_bag')
        self.bag, self.spec = bag, spec
        self.paused = spec.paused
        self.published = 0
        self.topic_publishers: dict[str, Publisher] = {}
        self._listener = (
            None if spec.listener is None else resolved_topic_name(self, spec.listener)
        )
        for topic in sorted(bag.topics if spec.topics is None else spec.topics):
            self._add_publisher(topic)
        if not self.topic_publishers:
            raise BagError(f'{bag.path}: expected a topic to play, got none')
        self._clock = self.create_publisher(Clock, CLOCK_TOPIC, 10)
        for name, paused in (('pause', True), ('resume', False)):
            self.create_service(Trigger, f'~/{name}', self._pause_service(paused))
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self)

    def _add_publisher(self, topic: str) -> None:
        if topic not in self.bag.topics:
            raise BagError(
                f'{self.bag.path}: expected topic {topic!r}, got {sorted(self.bag.topics)}'
            )
        # Two clocks would contradict each other, and the listener publishes its own topics itself.
        name = resolved_topic_name(self, self.spec.remap.get(topic, topic))
        own = self._listener is not None and name.startswith(f'{self._listener}/')
        if topic == CLOCK_TOPIC or own:
            return
        summary = self.bag.topics[topic]
        try:
            kind = message_class(summary.msgtype)
        except ImportError as error:
            if self.spec.topics is not None:
                raise BagError(f'{topic}: type {summary.msgtype!r}: {error}') from None
            self.get_logger().warning(f'{topic} is left out: {summary.msgtype}: {error}')
            return
        durability = DurabilityPolicy.VOLATILE
        if summary.latched:
            durability = DurabilityPolicy.TRANSIENT_LOCAL
        qos = QoSProfile(
            depth=QUEUE, reliability=ReliabilityPolicy.RELIABLE, durability=durability
        )
        self.topic_publishers[topic] = self.create_publisher(kind, name, qos)

    def _pause_service(self, paused: bool) -> Callable[..., Trigger.Response]:
        def handle(request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
            self.paused = paused
            response.success = True
            response.message = 'paused' if paused else 'playing'
            return response

        return handle

    def messages(self) -> Iterator[RawMessage]:
        """Messages to publish, from the start offset on."""
        start_ns = self.bag.start_ns + round(self.spec.start_offset_s * 1e9)
        return self.bag.messages(list(self.topic_publishers), start_ns)

    def publish(self, message: RawMessage) -> None:
        """Publish the recorded bytes."""
        self.topic_publishers[message.topic].publish(bytes(message.data))
        self.published += 1

    def publish_clock(self, now_ns: int) -> None:
        """Publish the time."""
        self._clock.publish(Clock(clock=ns_to_time(now_ns)))

    def serve(self, timeout_s: float) -> None:
        """Answer services for this long."""
        self._executor.spin_once(timeout_sec=max(0.0, timeout_s))

    def serve_until(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Answer services until something is done; False after the timeout."""
        end_s = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() >= end_s:
                return False
            self.serve(NAP_S)
        return True

    def await_active(self, node: str, timeout_s: float, stopped: Callable[[], bool]) -> None:
        """Wait until a lifecycle node is active; raises TimeoutError naming it."""
        client = self.create_client(GetState, f'{node}/get_state')
        end_s = time.monotonic() + timeout_s
        while not stopped():
            if time.monotonic() >= end_s:
                raise TimeoutError(
                    f'{node}: expected an active node within {timeout_s:g} s, got none'
                )
            if client.service_is_ready():
                # A node that loads its bundle answers when it has done so.
                future = client.call_async(GetState.Request())
                self.serve_until(future.done, 1.0)
                if future.done() and future.result().current_state.id == _ACTIVE:
                    return
            self.serve(NAP_S)

    def await_listeners(self, stopped: Callable[[], bool]) -> None:
        """Wait until somebody listens to every topic, but not for ever."""
        publishers = self.topic_publishers.values()
        self.serve_until(
            lambda: stopped() or all(p.get_subscription_count() for p in publishers), DISCOVERY_S
        )

    def deliver(self) -> None:
        """Wait until whoever listens has the last messages, but not for ever."""
        end_s = time.monotonic() + DELIVERY_S
        for publisher in self.topic_publishers.values():
            left_s = max(0.0, end_s - time.monotonic())
            publisher.wait_for_all_acked(Duration(seconds=left_s))

    def close(self) -> None:
        """Free the node."""
        self._executor.shutdown()
        self.destroy_node()


class PacedPlayback:
    """Plays once at a rate: the clock runs unless paused, and each message leaves at its time."""

    def __init__(self, player: BagPlayer, stopped: Callable[[], bool]) -> None:
        self._player, self._stopped = player, stopped
        spec = player.spec
        self._rate = spec.rate
        self._clock_s = 1.0 / spec.clock_hz if spec.clock_hz > 0 else None

    def play(self) -> None:
        """Publish every message; BagError where the recording is damaged, Stopped when asked."""
        begin_ns: int | None = None
        began_s = tick_s = time.monotonic()
        for message in self._player.messages():
            if begin_ns is None:
                begin_ns, began_s = message.received_ns, time.monotonic()
            due_s = began_s + (message.received_ns - begin_ns) * 1e-9 / self._rate
            while True:
                began_s, due_s = self._hold(began_s, due_s)
                now_s = time.monotonic()
                if self._stopped():
                    raise Stopped
                if self._clock_s is not None and now_s >= tick_s:
                    now_ns = begin_ns + round((min(now_s, due_s) - began_s) * self._rate * 1e9)
                    self._player.publish_clock(now_ns)
                    tick_s = now_s + self._clock_s
                if now_s >= due_s:
                    break
                nap_s = NAP_S if self._clock_s is None else min(NAP_S, self._clock_s)
                self._player.serve(min(nap_s, due_s - now_s))
            self._player.publish(message)

    def _hold(self, began_s: float, due_s: float) -> tuple[float, float]:
        """Stand still while paused; both times move on by as much."""
        paused_s = time.monotonic()
        while self._player.paused and not self._stopped():
            self._player.serve(NAP_S)
        # A message every few milliseconds must not keep a service waiting either.
        self._player.serve(0.0)
        away_s = time.monotonic() - paused_s
        if away_s < NAP_S:
            return began_s, due_s
        return began_s + away_s, due_s + away_s
