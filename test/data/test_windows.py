# SPDX-License-Identifier: Apache-2.0
"""Recordings become the windows that the live node will see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bags import MS, Recording

from tts_policy.control.images import ImageFit
from tts_policy.data.bag_samples import SampleReader, Topics
from tts_policy.data.data_check import DataCheck, describe
from tts_policy.data.demonstrations import find_demonstrations, load_windows, open_bag
from tts_policy.data.reader import BagError, BagReader
from tts_policy.data.replay import RecordedTicks
from tts_policy.data.windows import Episode, Windows, read_episodes, state_lead_steps
from tts_policy.sim.panda import COMMAND_JOINTS as JOINTS
from tts_policy.sim.panda import PANDA_CONTRACT

GOOD = Recording()

PANDA_TOPICS = Topics(cameras={'camera': '/camera/image'})


def _episodes(bag: Path, topics: Topics = PANDA_TOPICS) -> list[Episode]:
    return read_episodes(open_bag(bag, PANDA_CONTRACT, topics))


def _read(tmp_path: Path, recording: Recording) -> Episode:
    (episode,) = _episodes(recording.write(tmp_path / 'bag'))
    return episode


def test_streams_are_matched_by_name_and_header_stamp(tmp_path: Path) -> None:
    episode = _read(tmp_path, GOOD)
    assert len(episode) == 9
    assert episode.images['camera'].shape == (10, 96, 96, 3)
    assert episode.images['camera'][:, 5, 95, 2].tolist() == list(range(10))
    assert episode.image_index['camera'].tolist() == [[f, f + 1] for f in range(9)]
    stamps = 1.0 + 0.05 * (np.arange(9)[:, None] + np.arange(2))
    assert np.allclose(episode.joints, stamps[..., None] + np.arange(8))
    # The recorded action at t is the set-point to be reached one period later, then held: the last
    # command of these recordings ends at 1.53 s.
    due = np.minimum(1.05 + 0.05 * (np.arange(9)[:, None] + np.arange(16)), 1.53)
    assert np.allclose(episode.actions, due[..., None] + np.arange(8))


def test_a_window_takes_the_nearest_joint_state_that_is_not_after_its_tick(tmp_path: Path) -> None:
    episode = _read(tmp_path, replace(GOOD, joint_offset_ns=4 * MS))
    # At the tick the newest is 6 ms old; a period before, the nearest came 4 ms after the frame.
    ticks = 1.05 + 0.05 * np.arange(len(episode))
    assert np.allclose(episode.joints[:, 1, 0], ticks - 0.006)
    assert np.allclose(episode.joints[:, 0, 0], ticks - 0.05 + 0.004)


def test_training_windows_are_those_of_the_replayed_node(tmp_path: Path) -> None:
    bag = replace(GOOD, joint_offset_ns=3 * MS).write(tmp_path / 'bag')
    samples = SampleReader(BagReader(bag), PANDA_CONTRACT, PANDA_TOPICS)
    windows = Windows(_episodes(bag), PANDA_CONTRACT)
    ticks = list(RecordedTicks(samples, 50 * MS))
    assert len(ticks) == len(windows)
    images, joints, _ = windows.gather(torch.arange(len(windows)))
    for at, tick in enumerate(ticks):
        seen = tick.scheduled.observation
        assert np.array_equal(images['camera'][at].numpy(), seen['camera'])
        assert np.array_equal(joints[at].numpy(), seen['joints'].astype(np.float32))


def test_without_commands_the_states_that_followed_are_the_actions(tmp_path: Path) -> None:
    bag = replace(GOOD, commands=False).write(tmp_path / 'bag')
    topics = replace(PANDA_TOPICS, commands=None)
    (episode,) = _episodes(bag, topics)
    assert state_lead_steps(PANDA_CONTRACT) == 1
    assert np.allclose(episode.actions[0, :8, 0], 1.05 + 0.05 * np.arange(8))
    assert np.isfinite(episode.actions).all()


def test_a_lost_frame_costs_its_windows_and_a_gap_ends_the_episode(tmp_path: Path) -> None:
    bag = replace(GOOD, drop_frame=4).write(tmp_path / 'lost')
    assert [len(episode) for episode in _episodes(bag)] == [9 - 2]
    bag = replace(GOOD, pause_after=5, frames=12).write(tmp_path / 'gap')
    assert [len(episode) for episode in _episodes(bag)] == [5, 5]


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        ({'commands': False}, r"expected topics \['/joint_trajectory'\], got"),
        ({'joints': JOINTS[:5]}, r"missing \['panda_joint6', 'panda_joint7', .*"),
        ({'size': 64}, 'expected an image of 96 x 96 .*got 64 x 64'),
        ({'encoding': 'yuv422'}, "expected encoding rgb8, .*got 'yuv422'"),
        ({'bad_value': float('nan')}, 'expected finite positions'),
        ({'frames': 1}, 'expected windows, got none'),
    ],
)
def test_recordings_off_the_contract_are_refused(
    tmp_path: Path, change: dict, reason: str
) -> None:
    with pytest.raises(BagError, match=reason):
        _read(tmp_path, replace(GOOD, **change))


@pytest.mark.parametrize('names', [('left_finger', 'right_finger'), JOINTS])
def test_joint_states_that_hold_no_position_of_ours_are_not_ours(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    """Those of a gripper on the same topic, or those that give velocities alone."""
    recording = replace(GOOD, foreign_states=names)
    (episode,) = _episodes(recording.write(tmp_path / 'bag'))
    (plain,) = _episodes(GOOD.write(tmp_path / 'plain'))
    assert np.array_equal(episode.joints, plain.joints)


def test_a_recording_of_foreign_joint_states_alone_is_refused_by_their_names(
    tmp_path: Path,
) -> None:
    with pytest.raises(BagError, match=r"expected positions of \['panda_joint1'.* of \['finger'"):
        _read(tmp_path, replace(GOOD, joints=('finger', 'thumb')))


def test_windows_of_several_episodes_hold_their_own_last_action(tmp_path: Path) -> None:
    episode = _read(tmp_path, GOOD)
    windows = Windows([episode, episode], PANDA_CONTRACT)
    assert len(windows) == 2 * 9
    images, joints, actions = windows.gather(torch.tensor([0, 9, 17]))
    assert images['camera'].shape == (3, 2, 96, 96, 3) and images['camera'].dtype == torch.uint8
    assert images['camera'][:, :, 0, 0, 0].tolist() == [[0, 1], [0, 1], [8, 9]]
    assert joints.shape == (3, 2, 8) and actions.shape == (3, 16, 8)
    # Index 0 of the horizon belongs to the oldest observation of the window.
    assert torch.equal(actions[0], actions[1])
    assert torch.allclose(actions[2, :, 0], torch.tensor([1.45, 1.5, *[1.53] * 14]))


def test_the_data_check_names_gaps_and_the_bag_that_stands_out(tmp_path: Path) -> None:
    for number in range(6):
        GOOD.write(tmp_path / f'bag{number}')
    replace(GOOD, frames=60).write(tmp_path / 'long')
    replace(GOOD, drop_frame=4).write(tmp_path / 'lossy')
    check = DataCheck(PANDA_CONTRACT)
    found = find_demonstrations([tmp_path], PANDA_CONTRACT, {})
    load_windows(found, progress=False, check=check)
    report = check.report()
    assert report['bags'] == 8 and report['images'] == {'camera': '96 x 96'}
    assert report['streams']['camera']['rate_hz'] == pytest.approx(20.0)
    assert report['streams']['camera']['largest_gap_s'] == pytest.approx(0.1)
    assert report['joints'][JOINTS[0]]['low'] == pytest.approx(1.0)
    findings = '\n'.join(report['findings'])
    assert 'long: duration in s is 2.950, median of all 8 bags 0.450' in findings
    assert 'lossy: camera: 1 gaps of more than 1.5 periods, the largest 0.100 s' in findings
    assert 'bag0: duration' not in findings
    # The frames of these recordings are of one brightness each.
    assert '10 of 10 images are of one colour' in findings
    assert describe(report)[1].startswith('camera: 20.0 Hz')


def test_images_of_another_size_are_brought_to_the_contracts(tmp_path: Path) -> None:
    bag = replace(GOOD, size=64).write(tmp_path / 'bag')
    samples = open_bag(bag, PANDA_CONTRACT, PANDA_TOPICS, ImageFit.RESIZE)
    (episode,) = read_episodes(samples)
    assert episode.images['camera'].shape == (10, 96, 96, 3)
    assert episode.images['camera'][:, 40, 40, 0].tolist() == list(range(10))


def test_a_contract_whose_chunk_starts_at_the_newest_observation_has_no_action_before(
    tmp_path: Path,
) -> None:
    action = replace(PANDA_CONTRACT.action, starts_at_newest=True)
    contract = replace(PANDA_CONTRACT, action=action)
    (episode,) = read_episodes(open_bag(GOOD.write(tmp_path / 'bag'), contract, PANDA_TOPICS))
    assert episode.actions.shape[1] == contract.action.horizon
    assert np.allclose(episode.actions[0, :3, 0], [1.1, 1.15, 1.2])


def test_the_absence_of_demonstrations_is_said(tmp_path: Path) -> None:
    (tmp_path / 'empty').mkdir()
    with pytest.raises(BagError, match='expected a rosbag2 recording, got none'):
        find_demonstrations([tmp_path / 'empty'], PANDA_CONTRACT, {})
