# SPDX-License-Identifier: Apache-2.0
"""Messages become samples of the contract, the same by either decoder and from either tool."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest
from recordings import (
    HEIGHT,
    JOINTS,
    MS,
    START_NS,
    STORE,
    TYPES,
    WIDTH,
    Recording,
    compressed_image,
    header,
)

from tts_policy.control.observation import ObservationWindow, WindowSpec
from tts_policy.data.bag_samples import SampleReader, Topics, make_decoder
from tts_policy.data.reader import BagError, BagReader, RawMessage
from tts_policy.data.replay import RecordedTicks
from tts_policy.policy.policy import TestTimeSparsePolicy

if TYPE_CHECKING:
    from tts_policy.data.replay import RecordedTick
    from tts_policy.policy.contract import PolicyContract

INTERVAL = 400 * MS


def ticks(bag: Path, contract: PolicyContract, **topics: str) -> list[RecordedTick]:
    samples = SampleReader(BagReader(bag), contract, Topics.of(contract, topics))
    return list(RecordedTicks(samples, INTERVAL))


def assert_same_windows(
    left: list[RecordedTick], right: list[RecordedTick], pixels: int = 0
) -> None:
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        assert one.scheduled.stamp_ns == other.scheduled.stamp_ns
        assert one.scheduled.reset == other.scheduled.reset
        window, twin = one.scheduled.observation, other.scheduled.observation
        np.testing.assert_array_equal(window['joints'], twin['joints'])
        off = np.abs(window['camera'].astype(int) - twin['camera'].astype(int)).max()
        assert off <= pixels


def test_ticks_are_those_of_the_window_rule(
    tmp_path: Path, small_contract: PolicyContract
) -> None:
    recording = Recording(frames=40, gaps_after=(20,))
    got = ticks(recording.write(tmp_path / 'bag'), small_contract)
    # The first tick needs two frames; the gap of 2 s starts an episode, likewise.
    assert [(t.scheduled.stamp_ns - START_NS) // MS for t in got] == [
        50,
        450,
        850,
        3100,
        3500,
        3900,
    ]
    assert [t.scheduled.reset for t in got] == ['start', None, None, 'joints: gap', None, None]
    assert [t.scheduled.episode for t in got] == [0, 0, 0, 1, 1, 1]
    window = got[1].scheduled.observation
    assert np.array_equal(window['camera'], [recording.pixels(8), recording.pixels(9)])
    seconds = (got[1].scheduled.stamp_ns - np.array([50 * MS, 0])) * 1e-9
    assert np.allclose(window['joints'], np.sin(seconds[:, None] + np.arange(3)))


@pytest.mark.parametrize('commands', [True, False])
def test_the_future_is_the_recorded_command_or_else_the_measured_positions(
    tmp_path: Path, small_contract: PolicyContract, commands: bool
) -> None:
    got = ticks(Recording(commands=commands).write(tmp_path / 'bag'), small_contract)
    tick = got[1]
    # Set-point a is due a + 1 periods after the tick, and the robot follows without delay.
    due = tick.scheduled.stamp_ns * 1e-9 + 0.05 * (1 + np.arange(15))
    assert np.allclose(tick.future, np.sin(due[:, None] + np.arange(3)), atol=1e-3)
    assert np.isnan(got[-1].future[-1]).all(), 'nothing is known after the end'


@pytest.mark.parametrize('length', range(9))
def test_rosbags_decodes_what_rclpy_wrote_with_an_empty_array_at_its_end(
    tmp_path: Path, length: int
) -> None:
    serialization = pytest.importorskip('rclpy.serialization', reason='rclpy is not installed')
    from sensor_msgs.msg import JointState

    bag = BagReader(Recording(frames=1).write(tmp_path / 'bag'))
    message = JointState(name=['x' * length, 'finger'], position=[0.25, -1.5])
    raw = RawMessage(
        '/joint_states',
        'sensor_msgs/msg/JointState',
        0,
        serialization.serialize_message(message),
    )
    decoded = make_decoder(bag, ['/joint_states'])(raw)
    assert list(decoded.name) == message.name and list(decoded.position) == [0.25, -1.5]
    assert len(decoded.effort) == 0


def test_png_and_another_order_of_joints_change_nothing_and_jpeg_little(
    tmp_path: Path, small_contract: PolicyContract
) -> None:
    plain = Recording(noise=False)
    expected = ticks(plain.write(tmp_path / 'raw'), small_contract)
    twin = replace(plain, image='png', joints=JOINTS)
    assert_same_windows(expected, ticks(twin.write(tmp_path / 'png'), small_contract))
    twin = replace(plain, image='jpeg')
    assert_same_windows(expected, ticks(twin.write(tmp_path / 'jpeg'), small_contract), pixels=24)


def test_png_and_another_order_of_joints_change_no_chunk_and_jpeg_little(
    tmp_path: Path, small_bundle: Path
) -> None:
    """Chunks [ticks, 15, A] of the raw twin, at a sparsity, are those of png to the bit."""
    plain = Recording(noise=False)
    chunks = {}
    for name, twin in (
        ('raw', plain),
        ('png', replace(plain, image='png', joints=JOINTS)),
        ('jpeg', replace(plain, image='jpeg', joints=JOINTS)),
    ):
        policy = TestTimeSparsePolicy.from_bundle(small_bundle, 'ddim10')
        policy.reset(0)
        chunks[name] = np.array(
            [
                policy.act(tick.scheduled.observation, 0.5).actions
                for tick in ticks(twin.write(tmp_path / name), policy.contract)
            ]
        )
    np.testing.assert_array_equal(chunks['png'], chunks['raw'])
    off = np.abs(chunks['jpeg'] - chunks['raw']).max()
    assert 0 < off < 0.05 * np.ptp(chunks['raw'])


def test_other_topic_names_are_given_by_stream(
    tmp_path: Path, small_contract: PolicyContract
) -> None:
    bag = Recording(image_topic='/wrist/rgb').write(tmp_path / 'bag')
    with pytest.raises(
        BagError, match=r"bag: expected topics \['/camera/image'\], got .*'/wrist/rgb'"
    ):
        ticks(bag, small_contract)
    assert ticks(bag, small_contract, camera='/wrist/rgb')
    with pytest.raises(BagError, match=r"topics: expected .*, got \['wrist'\]"):
        ticks(bag, small_contract, wrist='/wrist/rgb')
    with pytest.raises(BagError, match=r'/joint_states: expected .*Image, got .*JointState'):
        ticks(bag, small_contract, camera='/joint_states')


@pytest.mark.fault
def test_a_clock_that_goes_back_ends_the_recording(
    tmp_path: Path, small_contract: PolicyContract
) -> None:
    bag = Recording(back_after=20).write(tmp_path / 'bag')
    reader = iter(
        RecordedTicks(
            SampleReader(BagReader(bag), small_contract, Topics.of(small_contract)), INTERVAL
        )
    )
    got = []
    with pytest.raises(BagError, match=r'joints: expected stamps that go forward, got \d+ ns'):
        while True:
            got.append(next(reader))
    assert [(t.scheduled.stamp_ns - START_NS) // MS for t in got] == [50, 450, 850]


@pytest.mark.fault
@pytest.mark.parametrize(
    ('make', 'reason'),
    [
        (lambda data: np.zeros(0, np.uint8), 'expected a jpeg or png, got'),
        (lambda data: data[:20], 'expected a jpeg or png, got 20 bytes'),
        (lambda data: np.r_[data[:40], np.zeros(40, np.uint8)], 'that can be decoded, got damage'),
    ],
)
def test_damaged_images_are_refused_and_counted(
    tmp_path: Path, small_contract: PolicyContract, make, reason: str
) -> None:
    recording = Recording(image='png')
    _, good = cv2.imencode('.png', recording.pixels(0))
    bad = compressed_image(START_NS, 'png', make(good.ravel()))
    messages = [('/camera/image', START_NS, bad), *list(recording.messages())[8:]]
    bag = recording.write(tmp_path / 'bag', messages)
    samples = SampleReader(BagReader(bag), small_contract, Topics.of(small_contract))
    assert list(RecordedTicks(samples, INTERVAL))
    refused = samples.refused['/camera/image']
    assert refused.count == 1 and reason in refused.reason


@pytest.mark.fault
@pytest.mark.parametrize('scheme', ['png', 'jpeg'])
def test_an_image_that_expands_is_refused_by_its_header(
    tmp_path: Path, small_contract: PolicyContract, scheme: str
) -> None:
    _, huge = cv2.imencode(f'.{scheme}', np.zeros((8000, 8000, 3), np.uint8))
    messages = list(Recording(frames=4).messages())
    messages = [m for m in messages if m[0] != '/camera/image']
    messages.append(('/camera/image', START_NS, compressed_image(START_NS, scheme, huge.ravel())))
    bag = Recording().write(tmp_path / 'bag', messages)
    samples = SampleReader(BagReader(bag), small_contract, Topics.of(small_contract))
    assert not list(RecordedTicks(samples, INTERVAL))
    assert f'of {HEIGHT} x {WIDTH} (height x width), got 8000 x 8000' in (
        samples.refused['/camera/image'].reason
    )


@pytest.mark.fault
def test_a_type_that_nobody_knows_is_named(tmp_path: Path, small_contract: PolicyContract) -> None:
    bag = Recording(frames=2).write(tmp_path / 'bag')
    reader = BagReader(bag)
    reader.topics['/joint_states'] = replace(reader.topics['/joint_states'], msgtype='a/msg/B')
    with pytest.raises(BagError, match=r"type 'a/msg/B': expected a standard one"):
        make_decoder(reader, ['/joint_states'])


@pytest.mark.parametrize('points', range(4))
@pytest.mark.parametrize('effort', [[], [0.5] * 2])
@pytest.mark.parametrize('velocity', [[], [0.5] * 2])
@pytest.mark.parametrize('frame', ['', 'a', 'base', 'a_frame'])
def test_rosbags_decodes_whatever_room_rclpy_left_behind_a_message(
    tmp_path: Path, frame: str, velocity: list[float], effort: list[float], points: int
) -> None:
    serialization = pytest.importorskip('rclpy.serialization', reason='rclpy is not installed')
    from sensor_msgs.msg import JointState
    from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

    bag = BagReader(Recording(frames=1).write(tmp_path / 'bag'))
    names, positions = ['a', 'b'], [1.5, -2.0]
    state = JointState(name=names, position=positions, velocity=velocity, effort=effort)
    point = JointTrajectoryPoint(positions=positions, velocities=velocity, effort=effort)
    chunk = JointTrajectory(joint_names=names, points=[point] * points)
    for message, topic in ((state, '/joint_states'), (chunk, '/joint_trajectory')):
        message.header.frame_id = frame
        kind = bag.topics[topic].msgtype
        raw = RawMessage(topic, kind, 0, bytes(serialization.serialize_message(message)))
        by_rclpy = serialization.deserialize_message(bytes(raw.data), type(message))
        by_rosbags = make_decoder(bag, [topic])(raw)
        assert by_rosbags.header.frame_id == frame
        if message is state:
            for name in ('name', 'position', 'velocity', 'effort'):
                assert list(getattr(by_rosbags, name)) == list(getattr(by_rclpy, name))
        else:
            assert [list(p.positions) for p in by_rosbags.points] == [positions] * points


@pytest.mark.fault
def test_bytes_that_are_no_message_are_one_line(tmp_path: Path) -> None:
    bag = BagReader(Recording(frames=1).write(tmp_path / 'bag'))
    decode = make_decoder(bag, ['/joint_states'])
    raw = STORE.serialize_cdr(Recording().state(0), 'sensor_msgs/msg/JointState')
    with pytest.raises(BagError, match=r'/joint_states: expected a sensor_msgs/msg/JointState'):
        decode(RawMessage('/joint_states', 'sensor_msgs/msg/JointState', 0, bytes(raw)[:30]))


def test_a_replayed_window_is_that_of_the_node(small_contract: PolicyContract) -> None:
    parameters = pytest.importorskip('tts_policy.node.parameters', reason='rclpy is not installed')
    defaults = parameters.Settings({row.name: row.default for row in parameters.PARAMETERS})
    spec = parameters.window_spec(defaults, small_contract)
    assert spec == WindowSpec.of(small_contract.observation)
    assert ObservationWindow(spec).spec.keys == ('camera', 'joints')


def test_a_recorded_image_of_another_size_is_refused(
    tmp_path: Path, small_contract: PolicyContract
) -> None:
    small = TYPES['sensor_msgs/msg/Image'](
        header(START_NS), 2, 2, 'rgb8', 0, 6, np.zeros(12, np.uint8)
    )
    messages = [*Recording(frames=4).messages(), ('/camera/image', START_NS + 300 * MS, small)]
    bag = Recording().write(tmp_path / 'bag', messages)
    samples = SampleReader(BagReader(bag), small_contract, Topics.of(small_contract))
    assert list(RecordedTicks(samples, INTERVAL))
    assert 'expected an image of 24 x 32' in samples.refused['/camera/image'].reason
