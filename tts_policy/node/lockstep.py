# SPDX-License-Identifier: Apache-2.0
"""Plays a recording to a policy node so that every tick is the one that `evaluate_bag` makes.

Nothing depends on timing: after every message the player waits until the node has handled it
(its lifecycle service is answered by the same thread, after the message), and after a message
that completes a tick until its chunk is there. Which messages do so is computed by the node's own
rule, with the settings that the node is asked for. The clock stands at the newest header stamp.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lifecycle_msgs.msg import State
from lifecycle_msgs.srv import GetState
from rcl_interfaces.srv import GetParameters
from rclpy.parameter import parameter_value_to_python
from rclpy.qos import QoSProfile, ReliabilityPolicy
from std_msgs.msg import String

from tts_policy.control.conversions import seconds_to_ns
from tts_policy.data.bag_samples import SampleReader, Topics
from tts_policy.data.reader import BagError, RawMessage
from tts_policy.data.replay import ReplaySchedule
from tts_policy.node.interface import compressed_topic
from tts_policy.node.parameters import Settings, sensor_options, window_spec
from tts_policy.node.player import NAP_S, BagPlayer, Stopped
from tts_policy.policy.contract import read_contract

_SETTINGS = (
    'use_sim_time',
    'bundle',
    'n_execute',
    'max_observation_age_s',
    'sample_tolerance_s',
    'gap_limit_s',
    'future_limit_s',
    'max_skew_s',
    'max_position',
    'image_fit',
    'reliable_sensors',
)
# A best-effort subscriber may have missed the clock; saying it again changes nothing.
CLOCK_AGAIN_S = 1.0


class LockstepError(RuntimeError):
    """The node cannot be played to in lockstep, or does not answer; one line."""


class LockstepPlayback:
    """Plays to one policy node until `stopped`."""

    def __init__(
        self,
        player: BagPlayer,
        node: str,
        topics: dict[str, str],
        timeout_s: float,
        stopped: Callable[[], bool],
    ) -> None:
        """Wait for the node and take over its settings.

        Raises
        ------
        LockstepError
            if it is not there in time, not active, or does not run on /clock.
        Stopped
            when that was asked for meanwhile.

        """
        self._player, self._node, self._timeout_s = player, node, timeout_s
        self._stopped = stopped
        self._stamps: set[int] = set()
        qos = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
        player.create_subscription(String, f'{node}/chunk_stats', self._on_chunk, qos)
        self._state = player.create_client(GetState, f'{node}/get_state')
        settings = self._settings()
        if not settings['use_sim_time']:
            raise LockstepError(f'{node}: expected use_sim_time true, got false')
        contract = read_contract(Path(settings['bundle']) / 'model.yaml')
        n_execute = settings['n_execute'] or contract.action.execute
        self._interval_ns = n_execute * seconds_to_ns(contract.observation.period_s)
        self._spec, sensors = window_spec(settings, contract), sensor_options(settings)
        compressed = {key: f'/{compressed_topic(key)}' for key in sensors.compressed}
        self._samples = SampleReader(
            player.bag, contract, Topics.of(contract, compressed | topics), fit=sensors.fit
        )
        self._streams = {*self._samples.topics.cameras.values(), self._samples.topics.joints}
        missing = self._streams - set(player.topic_publishers)
        if missing:
            raise LockstepError(
                f'{node}: expected to play topics {sorted(missing)}, '
                f'got {sorted(player.topic_publishers)}'
            )

    def _on_chunk(self, message: String) -> None:
        self._stamps.add(int(json.loads(message.data)['stamp_ns']))

    def _served(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Serve until `done`; False after the timeout."""
        in_time = self._player.serve_until(lambda: self._stopped() or done(), timeout_s)
        if self._stopped():
            raise Stopped
        return in_time

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        if not self._served(done, self._timeout_s):
            raise LockstepError(
                f'{self._node}: expected {what} within {self._timeout_s:g} s, got none'
            )

    def _call(self, client: Any, request: Any, what: str) -> Any:
        self._wait(client.service_is_ready, f'service {client.srv_name}')
        future = client.call_async(request)
        self._wait(future.done, what)
        return future.result()

    def _settings(self) -> Settings:
        client = self._player.create_client(GetParameters, f'{self._node}/get_parameters')
        values = self._parameters(client, *_SETTINGS)
        if len(values) != len(_SETTINGS):
            raise LockstepError(
                f'{self._node}: expected a policy node, got one without its parameters'
            )
        # rclpy answers for an array that was never set with nothing at all.
        compressed = self._parameters(client, 'compressed_cameras')
        settings = dict(zip(_SETTINGS, values, strict=True))
        return Settings(settings | {'compressed_cameras': compressed[0] if compressed else None})

    def _parameters(self, client: Any, *names: str) -> list[Any]:
        response = self._call(client, GetParameters.Request(names=list(names)), 'parameters')
        return [parameter_value_to_python(value) for value in response.values]

    def _handled(self) -> None:
        """Return when the node has handled all that was published before."""
        state = self._call(self._state, GetState.Request(), 'an answer').current_state
        if state.id != State.PRIMARY_STATE_ACTIVE:
            raise LockstepError(f'{self._node}: expected an active node, got {state.label}')

    def play(self) -> None:
        """Publish every message; BagError where the recording is damaged, Stopped when asked."""
        player = self._player
        inputs = [player.topic_publishers[topic] for topic in sorted(self._streams)]
        self._wait(
            lambda: all(p.get_subscription_count() for p in inputs), 'subscriptions to its input'
        )
        self._wait(
            lambda: player.count_publishers(f'{self._node}/chunk_stats') > 0, 'topic ~/chunk_stats'
        )
        self._handled()
        schedule = ReplaySchedule(self._spec, self._interval_ns)
        for message in player.messages():
            while player.paused and not self._stopped():
                player.serve(NAP_S)
            if self._stopped():
                raise Stopped
            if message.topic in self._streams:
                self._step(schedule, message)
            else:
                player.publish(message)
                player.serve(0.0)

    def _step(self, schedule: ReplaySchedule, message: RawMessage) -> None:
        """Publish one message of the node's input, and wait for what it brings about."""
        sample = self._samples.convert(message)
        try:
            ticks = [] if sample is None else schedule.add(sample)
        except ValueError as error:
            raise BagError(f'{self._player.bag.path}: {error}') from None
        self._player.publish_clock(schedule.now_ns)
        self._player.publish(message)
        self._handled()
        for tick in ticks:
            self._await_chunk(tick.stamp_ns, schedule.now_ns)

    def _await_chunk(self, stamp_ns: int, now_ns: int) -> None:
        waited_s = 0.0
        while not self._served(lambda: stamp_ns in self._stamps, CLOCK_AGAIN_S):
            waited_s += CLOCK_AGAIN_S
            if waited_s >= self._timeout_s:
                raise LockstepError(
                    f'{self._node}: expected a chunk for stamp {stamp_ns} within '
                    f'{self._timeout_s:g} s, got none'
                )
            self._player.publish_clock(now_ns)
        self._stamps.discard(stamp_ns)
