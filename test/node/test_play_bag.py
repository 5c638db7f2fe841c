# SPDX-License-Identifier: Apache-2.0
"""play_bag against real nodes in processes of their own; in lockstep it is evaluate_bag."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from recordings import MS, START_NS, Recording

pytest.importorskip('rclpy', reason='rclpy is not installed')

from feeder import Feeder
from processes import RosProcess, wait_until
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import JointState
from std_srvs.srv import Trigger

from tts_policy.control.conversions import time_to_ns
from tts_policy.data import evaluate_bag
from tts_policy.data.evaluate_bag import bag_folder
from tts_policy.data.reader import BagReader
from tts_policy.data.summary import segments
from tts_policy.node.player import BagPlayer, PlayerSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from rclpy.node import Node

PLAY = 'tts_policy.node.play_bag'
SEED, SPARSITY = 3, 0.8


@pytest.fixture
def policy(start_process: Callable[..., RosProcess], small_bundle: Path) -> Callable[..., None]:
    """Start a policy node on simulated time that listens reliably."""

    def start(**parameters: Any) -> RosProcess:
        values = {
            'bundle': small_bundle,
            'sampler': 'ddim10',
            'sparsity': SPARSITY,
            'seed': SEED,
            'use_sim_time': 'true',
            'reliable_sensors': 'true',
            'autostart': 'true',
            'limits.first_point_default': 9.0,
            **parameters,
        }
        arguments = [item for name, value in values.items() for item in ('-p', f'{name}:={value}')]
        return start_process('tts_policy.node.policy_node', '--ros-args', *arguments)

    return start


def evaluated(bag: Path, bundle: Path, out: Path, *options: str) -> tuple[np.ndarray, np.ndarray]:
    """Stamps [n] and chunks [n, 15, A] of evaluate_bag at the sparsity of the node."""
    arguments = [str(bag), '--bundle', str(bundle), '--out', str(out), '--seed', str(SEED)]
    assert evaluate_bag.main([*arguments, '--sparsity', str(SPARSITY), *options]) == 0
    stamps, actions = [], []
    for path in segments(bag_folder(out, bag)):
        with np.load(path) as data:
            stamps.append(data['stamp_ns'])
            actions.append(data['actions'][:, 1])
    return np.concatenate(stamps), np.concatenate(actions)


COMPRESSED = '/camera/image/compressed'
LARGE_AND_COMPRESSED = (
    Recording(frames=60, gaps_after=(20, 35), image='png', size=(60, 70), image_topic=COMPRESSED),
    ['--image-fit', 'crop', '--topic', f'camera:={COMPRESSED}'],
    {'image_fit': 'crop', 'compressed_cameras': '[camera]'},
)


@pytest.mark.parametrize(
    ('recording', 'options', 'parameters'),
    [(Recording(frames=60, gaps_after=(20, 35)), [], {}), LARGE_AND_COMPRESSED],
    ids=['raw', 'large and compressed'],
)
def test_lockstep_play_to_a_live_node_gives_the_bits_of_evaluate_bag(
    recording: Recording,
    options: list[str],
    parameters: dict[str, str],
    tmp_path: Path,
    test_node: Node,
    policy: Callable[..., RosProcess],
    start_process: Callable[..., RosProcess],
    small_bundle: Path,
) -> None:
    bag = recording.write(tmp_path / 'bag')
    stamps, actions = evaluated(bag, small_bundle, tmp_path / 'out', *options)
    assert len(stamps) == 8
    feeder = Feeder(test_node)
    policy(**parameters)
    # Its publisher keeps one message only: who listens too late misses the first.
    for topic in ('proposed_trajectory', 'chunk_stats'):
        name = f'/tts_policy/{topic}'
        wait_until(lambda name=name: test_node.count_publishers(name), 30, topic)
    player = start_process(PLAY, str(bag), '--lockstep', '/tts_policy')
    assert player.wait(120) == 0, player.output
    wait_until(lambda: len(feeder.proposals) >= len(stamps), 5, 'the last proposal')
    assert [time_to_ns(p.header.stamp) for p in feeder.proposals] == stamps.tolist()
    assert [tick['stamp_ns'] for tick in feeder.ticks] == stamps.tolist()
    assert sum(tick['reset'] is not None for tick in feeder.ticks) == 3
    # Nothing was past when it was published, so the points are the whole chunk.
    assert all(tick['dropped_points'] == 0 for tick in feeder.ticks)
    for proposal, chunk in zip(feeder.proposals, actions, strict=True):
        live = np.array([list(point.positions) for point in proposal.points])
        np.testing.assert_array_equal(live, chunk)


@pytest.mark.fault
@pytest.mark.parametrize(
    ('parameters', 'reason'),
    [
        ({'use_sim_time': 'false'}, '/tts_policy: expected use_sim_time true, got false'),
        ({'autostart': 'false'}, '/tts_policy: expected .* within 1 s'),
    ],
)
def test_lockstep_says_what_is_wrong_with_the_node(
    tmp_path: Path,
    policy: Callable[..., RosProcess],
    start_process: Callable[..., RosProcess],
    parameters: dict[str, str],
    reason: str,
) -> None:
    bag = Recording(frames=4).write(tmp_path / 'bag')
    node = policy(**parameters)
    wait_until(lambda: node.running, 5, 'the node')
    player = start_process(PLAY, str(bag), '--lockstep', '/tts_policy', '--timeout', '10')
    assert player.wait(120) == 1
    assert 'Traceback' not in player.output
    pattern = reason.replace('1 s', '10 s')
    assert re.search(pattern, player.output.splitlines()[-1])


@pytest.mark.parametrize('autostart', [True, False])
def test_playing_begins_when_the_node_is_active(
    tmp_path: Path,
    policy: Callable[..., RosProcess],
    start_process: Callable[..., RosProcess],
    autostart: bool,
) -> None:
    bag = Recording(frames=4).write(tmp_path / 'bag')
    node = policy(autostart=str(autostart).lower())
    timeout_s = 120 if autostart else 5
    player = start_process(PLAY, str(bag), '--after', '/tts_policy', '--timeout', str(timeout_s))
    if autostart:
        assert player.wait(240) == 0, player.output
        assert 'messages published' in player.output
        assert 'active, output disabled' in node.output
    else:
        assert player.wait(120) == 1
        assert '/tts_policy: expected an active node within 5 s' in player.output
        assert 'messages published' not in player.output


def test_a_signal_ends_the_wait_for_a_node_that_is_not_there(
    tmp_path: Path, test_node: Node, start_process: Callable[..., RosProcess]
) -> None:
    bag = Recording(frames=2).write(tmp_path / 'bag')
    player = start_process(PLAY, str(bag), '--lockstep', '/nobody', '--timeout', '600')
    wait_until(lambda: test_node.count_subscribers('/nobody/chunk_stats'), 30, 'the player')
    assert player.stop(120) == 130, player.output
    assert '0 messages published' in player.output and 'Traceback' not in player.output


class Listener:
    """What a recording sounds like on its topics."""

    def __init__(self, node: Node, topic: str = '/joint_states') -> None:
        self.states: list[int] = []
        self.clock: list[int] = []
        qos = QoSProfile(depth=1000, reliability=ReliabilityPolicy.RELIABLE)
        node.create_subscription(
            JointState, topic, lambda m: self.states.append(time_to_ns(m.header.stamp)), qos
        )
        node.create_subscription(
            Clock, '/clock', lambda m: self.clock.append(time_to_ns(m.clock)), qos
        )


def test_a_part_of_a_bag_is_played_under_another_name_with_a_clock(
    tmp_path: Path, test_node: Node, start_process: Callable[..., RosProcess]
) -> None:
    bag = Recording(frames=60).write(tmp_path / 'bag')
    listener = Listener(test_node, '/replayed/states')
    options = ['--topics', '/joint_states', '--remap', '/joint_states:=/replayed/states']
    player = start_process(
        PLAY, str(bag), *options, '--start-offset', '1.0', '--rate', '2', '--start-paused'
    )
    resume = test_node.create_client(Trigger, '/play_bag/resume')
    assert resume.wait_for_service(60)
    wait_until(lambda: test_node.count_publishers('/replayed/states'), 10, 'the player')
    assert not listener.states
    answer = resume.call_async(Trigger.Request())
    wait_until(answer.done, 10, 'an answer')
    assert player.wait(60) == 0, player.output
    wait_until(lambda: len(listener.states) == 200, 5, 'every state from one second on')
    assert listener.states == [START_NS + (100 + n) * 10 * MS for n in range(200)]
    assert len(listener.clock) > 2 and listener.clock == sorted(listener.clock)
    assert listener.clock[0] >= START_NS + 1_000 * MS
    assert listener.clock[-1] <= START_NS + 3_000 * MS
    assert '200 messages published' in player.output


def test_playing_pauses_loops_and_ends_by_signal(
    tmp_path: Path, test_node: Node, start_process: Callable[..., RosProcess]
) -> None:
    bag = Recording(frames=10).write(tmp_path / 'bag')
    listener = Listener(test_node)
    player = start_process(PLAY, str(bag), '--loop', '--topics', '/joint_states')
    wait_until(lambda: len(listener.states) > 60, 20, 'the second round')
    pause = test_node.create_client(Trigger, '/play_bag/pause')
    assert pause.wait_for_service(20)
    answer = pause.call_async(Trigger.Request())
    wait_until(answer.done, 10, 'an answer')
    assert answer.result().success and answer.result().message == 'paused'

    def silent() -> bool:
        """Nothing for half a second, in which fifty states would come."""
        seen = len(listener.states)
        time.sleep(0.5)
        return len(listener.states) == seen

    wait_until(silent, 10, 'the end of what was under way')
    assert player.stop() == 130
    assert 'Traceback' not in player.output


def test_what_the_listening_node_said_when_recorded_is_not_said_again(
    tmp_path: Path, ros: None
) -> None:
    recording = Recording(frames=1)
    states = [message for message in recording.messages() if message[0] == '/joint_states']
    said = [('/left/tts_policy/chunk_stats', *rest) for _, *rest in states]
    bag = BagReader(recording.write(tmp_path / 'bag', [*states, *said]))
    for listener, count in (
        ('/left/tts_policy', 1),
        ('left/tts_policy', 1),
        ('/left/tts', 2),
        (None, 2),
    ):
        player = BagPlayer(bag, PlayerSpec(listener=listener))
        assert len(player.topic_publishers) == count
        player.close()


@pytest.mark.fault
@pytest.mark.parametrize(
    ('arguments', 'status', 'reason'),
    [
        (['--topics', '/nothing'], 1, "play_bag: .*expected topic '/nothing', got"),
        (['--remap', 'x'], 1, "play_bag: --remap: expected FROM:=TO, got 'x'"),
        (['--remap', '/joint_states:=a b'], 1, "play_bag: Invalid topic name: .*: 'a b'"),
        (['--lockstep', 'a b'], 1, "play_bag: Invalid topic name: .*: 'a b'"),
        (['--rate', '0'], 2, '--rate: expected at least 0.001, got 0.0'),
    ],
)
def test_what_cannot_be_played_is_one_line(
    tmp_path: Path,
    start_process: Callable[..., RosProcess],
    arguments: list[str],
    status: int,
    reason: str,
) -> None:
    bag = Recording(frames=2).write(tmp_path / 'bag')
    player = start_process(PLAY, str(bag), *arguments)
    assert player.wait(60) == status
    assert re.search(reason, player.output.splitlines()[-1])
    assert 'Traceback' not in player.output
