# SPDX-License-Identifier: Apache-2.0
"""Recordings become the windows that the live node will see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bags import MS, Recording

from tts_policy.train.dataset import BagError, Windows, find_bags, read_episode
from tts_policy.train.lift_contract import JOINTS, LIFT_CONTRACT, LIFT_TOPICS

GOOD = Recording()


def _read(tmp_path: Path, recording: Recording):
    return read_episode(recording.write(tmp_path / 'bag'), LIFT_CONTRACT, LIFT_TOPICS)


def test_streams_are_matched_by_name_and_header_stamp(tmp_path: Path) -> None:
    episode = _read(tmp_path, GOOD)
    assert len(episode) == 10
    assert episode.images['camera'].shape == (10, 96, 96, 3)
    assert episode.images['camera'][:, 5, 95, 2].tolist() == list(range(10))
    stamps = 1.0 + 0.05 * np.arange(10)
    assert np.allclose(episode.joints, stamps[:, None] + np.arange(8))
    # The recorded action at t is the set-point to be reached one period later.
    assert np.allclose(episode.actions, stamps[:, None] + 0.05 + np.arange(8))


def test_a_frame_takes_the_newest_joint_state_not_after_it(tmp_path: Path) -> None:
    episode = _read(tmp_path, replace(GOOD, joint_offset_ns=4 * MS))
    # The first frame has no joint state yet; later ones are 6 ms old.
    assert len(episode) == 9
    assert np.allclose(episode.joints[:, 0], 1.05 + 0.05 * np.arange(9) - 0.006)


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        ({'commands': False}, r"topics \['/joint_trajectory'\] expected, got"),
        ({'joints': JOINTS[:5]}, r"joints \['panda_joint6', 'panda_joint7', .*expected"),
        ({'size': 64}, 'expected rgb8 96x96, got rgb8 64x64'),
        ({'encoding': 'bgr8'}, 'expected rgb8 96x96, got bgr8'),
        ({'drop_frame': 4}, r'gaps up to 0\.1 s'),
        ({'bad_value': float('nan')}, 'must be finite'),
        ({'frames': 1}, '1 usable frames, expected at least 2'),
    ],
)
def test_recordings_off_the_contract_are_refused(
    tmp_path: Path, change: dict, reason: str
) -> None:
    with pytest.raises(BagError, match=reason):
        _read(tmp_path, replace(GOOD, **change))


def test_windows_are_never_padded_at_the_start_and_hold_the_last_action(tmp_path: Path) -> None:
    episode = _read(tmp_path, GOOD)
    windows = Windows([episode, episode], LIFT_CONTRACT)
    assert len(windows) == 2 * 9
    images, joints, actions = windows.gather(torch.tensor([0, 9, 17]))
    assert images['camera'].shape == (3, 2, 96, 96, 3) and images['camera'].dtype == torch.uint8
    assert images['camera'][:, :, 0, 0, 0].tolist() == [[0, 1], [0, 1], [8, 9]]
    assert joints.shape == (3, 2, 8) and actions.shape == (3, 16, 8)
    # Index 0 of the horizon belongs to the oldest observation of the window.
    first = torch.from_numpy(episode.actions).float()
    assert torch.equal(actions[0, :10], first) and torch.equal(
        actions[0, 10:], first[-1:].expand(6, 8)
    )
    assert torch.equal(actions[2], torch.cat([first[8:9], first[-1:].expand(15, 8)]))


def test_bags_are_found_in_folders_and_their_absence_is_said(tmp_path: Path) -> None:
    bags = [Recording(frames=2).write(tmp_path / name) for name in ('b', 'a')]
    assert find_bags([tmp_path]) == sorted(bags)
    assert find_bags([bags[0]])[0] == bags[0]
    (tmp_path / 'empty').mkdir()
    with pytest.raises(BagError, match='no rosbag2 recording'):
        find_bags([tmp_path / 'empty'])
