# SPDX-License-Identifier: Apache-2.0
"""record_bag in a process of its own: what it hears is what can be played and evaluated again."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from recordings import Recording

pytest.importorskip('rclpy', reason='rclpy is not installed')

from processes import RosProcess, wait_until
from rclpy.duration import Duration
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import JointState
from std_msgs.msg import String
from std_srvs.srv import Trigger

from tts_policy.data import evaluate_bag
from tts_policy.data.bag_samples import make_decoder
from tts_policy.data.evaluate_bag import bag_folder
from tts_policy.data.reader import BagReader, RawMessage
from tts_policy.data.summary import segments
from tts_policy.node.interface import LATCHED_QOS
from tts_policy.node.player import BagPlayer, PacedPlayback, PlayerSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from rclpy.node import Node

RECORD = 'tts_policy.node.record_bag'
INPUT = ['/camera/image', '/joint_states', '/joint_trajectory']
RELIABLE = QoSProfile(depth=100, reliability=ReliabilityPolicy.RELIABLE)
BEST_EFFORT = QoSProfile(depth=100, reliability=ReliabilityPolicy.BEST_EFFORT)


def matched(publishers: list[Any]) -> Callable[[], bool]:
    return lambda: all(publisher.get_subscription_count() for publisher in publishers)


def by_topic(bag: Path) -> dict[str, list[RawMessage]]:
    """Messages of every topic that has any, in order."""
    found: dict[str, list[RawMessage]] = {}
    for message in BagReader(bag).messages():
        found.setdefault(message.topic, []).append(message)
    return found


def test_what_is_played_is_what_is_recorded(
    tmp_path: Path, ros: None, start_process: Callable[..., RosProcess]
) -> None:
    bag, out = Recording(frames=12).write(tmp_path / 'bag'), tmp_path / 'out' / 'recorded'
    player = BagPlayer(BagReader(bag), PlayerSpec(rate=0.5, clock_hz=0.0))
    recorder = start_process(RECORD, str(out), '--topics', *INPUT, '--compress')
    wait_until(matched(list(player.topic_publishers.values())), 30, 'the recorder')
    PacedPlayback(player, lambda: False).play()
    player.deliver()
    assert recorder.stop(60) == 0, recorder.output
    player.close()
    played, recorded = by_topic(bag), by_topic(out)
    assert sorted(recorded) == INPUT
    for topic, messages in played.items():
        assert [m.data for m in recorded[topic]] == [m.data for m in messages]
        assert {m.msgtype for m in recorded[topic]} == {m.msgtype for m in messages}
    assert f'{12 * 7} messages' in recorder.output


def test_best_effort_publishers_are_heard_and_latched_topics_stay_latched(
    tmp_path: Path, test_node: Node, start_process: Callable[..., RosProcess]
) -> None:
    reliable = test_node.create_publisher(JointState, '/arm/states', RELIABLE)
    latched = test_node.create_publisher(String, '/description', LATCHED_QOS)
    latched.publish(String(data='said before anybody listened'))
    hidden = test_node.create_publisher(String, '/_hidden', RELIABLE)
    out = tmp_path / 'recorded'
    recorder = start_process(RECORD, str(out), '--exclude', '/rosout')
    wait_until(matched([reliable, latched]), 30, 'the recorder')
    # It has to ask for less now, or it would never hear this one.
    sensor = test_node.create_publisher(JointState, '/arm/states', BEST_EFFORT)
    wait_until(matched([sensor, reliable]), 30, 'the recorder on a second publisher')
    for _ in range(50):
        sensor.publish(JointState(name=['sensor'], position=[0.5]))
        reliable.publish(JointState(name=['reliable'], position=[0.5]))
        time.sleep(0.02)
    assert latched.wait_for_all_acked(Duration(seconds=20))
    assert hidden.get_subscription_count() == 0
    assert recorder.stop(60) == 0, recorder.output
    bag = BagReader(out)
    decode = make_decoder(bag, ['/arm/states'])
    names = {decode(message).name[0] for message in bag.messages(['/arm/states'])}
    assert names == {'sensor', 'reliable'}
    topics = bag.topics
    assert topics['/description'].count == 1 and topics['/description'].latched
    assert not {'/_hidden', '/rosout'} & set(topics)
    for publisher in (sensor, latched, hidden, reliable):
        test_node.destroy_publisher(publisher)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_recording_with_its_index(
    tmp_path: Path,
    test_node: Node,
    start_process: Callable[..., RosProcess],
    number: signal.Signals,
) -> None:
    publisher = test_node.create_publisher(String, '/words', RELIABLE)
    out = tmp_path / 'recorded'
    recorder = start_process(RECORD, str(out), '--topics', '/words', '/silence')
    wait_until(matched([publisher]), 30, 'the recorder')
    publisher.publish(String(data='one'))
    assert publisher.wait_for_all_acked(Duration(seconds=20))
    recorder.send(number)
    assert recorder.wait(60) == 1
    assert 'record_bag: /silence: expected messages, got none' in recorder.lines
    assert 'Traceback' not in recorder.output
    assert len(by_topic(out)['/words']) == 1
    test_node.destroy_publisher(publisher)


@pytest.mark.fault
def test_a_killed_recorder_leaves_what_it_heard_until_a_second_before(
    tmp_path: Path, test_node: Node, start_process: Callable[..., RosProcess]
) -> None:
    publisher = test_node.create_publisher(String, '/words', RELIABLE)
    out = tmp_path / 'recorded'
    recorder = start_process(RECORD, str(out), '--topics', '/words')
    wait_until(matched([publisher]), 30, 'the recorder')
    publisher.publish(String(data='heard in time'))
    assert publisher.wait_for_all_acked(Duration(seconds=20))
    file = out / 'recorded.mcap'
    wait_until(lambda: b'heard in time' in file.read_bytes(), 5, 'the message in the file')
    recorder.send(signal.SIGKILL)
    recorder.wait(60)
    assert b'heard in time' in file.read_bytes()
    test_node.destroy_publisher(publisher)


@pytest.mark.fault
def test_a_recording_is_never_written_over(
    tmp_path: Path, start_process: Callable[..., RosProcess]
) -> None:
    bag = Recording(frames=2).write(tmp_path / 'bag')
    before = by_topic(bag)
    recorder = start_process(RECORD, str(bag))
    assert recorder.wait(60) == 2
    assert recorder.lines[-1] == (f'record_bag: {bag}: expected a new folder, got one that exists')
    assert by_topic(bag) == before


@pytest.mark.fault
@pytest.mark.parametrize('option', ['--topics', '--exclude'])
def test_a_name_that_is_no_topic_is_one_line(
    tmp_path: Path, start_process: Callable[..., RosProcess], option: str
) -> None:
    out = tmp_path / 'recorded'
    recorder = start_process(RECORD, str(out), option, 'a b')
    assert recorder.wait(60) == 2
    assert re.fullmatch("record_bag: Invalid topic name: .*: 'a b' .*", recorder.lines[-1])
    assert 'Traceback' not in recorder.output and not out.exists()


@pytest.mark.fault
def test_a_recording_of_nothing_is_no_success(
    tmp_path: Path, start_process: Callable[..., RosProcess]
) -> None:
    out = tmp_path / 'recorded'
    recorder = start_process(RECORD, str(out), '--topics', '/silence', '--duration', '0.5')
    assert recorder.wait(60) == 1
    assert 'record_bag: /silence: expected messages, got none' in recorder.lines
    assert BagReader(out).topics == {}


def chunks(bag: Path, bundle: Path, out: Path) -> tuple[np.ndarray, np.ndarray]:
    """Stamps and chunks of evaluate_bag at 80 %."""
    arguments = [str(bag), '--bundle', str(bundle), '--out', str(out), '--sparsity', '0.8']
    assert evaluate_bag.main(arguments) == 0
    stamps, actions = [], []
    for path in segments(bag_folder(out, bag)):
        with np.load(path) as data:
            stamps.append(data['stamp_ns'])
            actions.append(data['actions'])
    return np.concatenate(stamps), np.concatenate(actions)


def test_a_recording_of_the_live_node_is_evaluated_like_what_it_was_played(
    tmp_path: Path,
    test_node: Node,
    start_process: Callable[..., RosProcess],
    small_bundle: Path,
) -> None:
    bag = Recording(frames=40, gaps_after=(20,)).write(tmp_path / 'bag')
    out = tmp_path / 'recorded'
    parameters = ['use_sim_time:=true', 'reliable_sensors:=true', 'autostart:=true']
    parameters += ['sampler:=ddim10', f'bundle:={small_bundle}', 'limits.first_point_default:=9.0']
    arguments = [item for value in parameters for item in ('-p', value)]
    start_process('tts_policy.node.policy_node', '--ros-args', *arguments)
    said = ['/tts_policy/chunk_stats', '/tts_policy/proposed_trajectory']
    options = ['--topics', *INPUT, *said, '/diagnostics', '--queue', '5000']
    recorder = start_process(RECORD, str(out), *options)
    player = start_process(
        'tts_policy.node.play_bag', str(bag), '--lockstep', '/tts_policy', '--start-paused'
    )
    for topic in (*INPUT, *said):
        wait_until(lambda topic=topic: test_node.count_subscribers(topic), 30, topic)
    wait_until(lambda: recorder_hears(test_node, INPUT), 30, 'the recorder')
    resume = test_node.create_client(Trigger, '/play_bag/resume')
    assert resume.wait_for_service(120)
    answer = resume.call_async(Trigger.Request())
    wait_until(answer.done, 10, 'an answer')
    assert player.wait(120) == 0, player.output
    # /diagnostics come once a second, and the test has no other news of them.
    assert recorder.stop(60) in (0, 1), recorder.output
    recorded = by_topic(out)
    stamps, actions = chunks(bag, small_bundle, tmp_path / 'one')
    again, same = chunks(out, small_bundle, tmp_path / 'two')
    assert again.tolist() == stamps.tolist()
    np.testing.assert_array_equal(same, actions)
    # The player waited for the last word itself, but not for the recorder to hear it.
    assert len(recorded['/tts_policy/chunk_stats']) >= len(stamps) - 1


def recorder_hears(node: Node, topics: list[str]) -> bool:
    """Whether the recorder subscribes to all of these."""
    heard = dict(
        node.get_subscriber_names_and_types_by_node('record_bag', '/')
        if 'record_bag' in node.get_node_names()
        else []
    )
    return set(topics) <= set(heard)
