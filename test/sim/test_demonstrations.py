# SPDX-License-Identifier: Apache-2.0
"""The expert lifts the cube, and what it did is in the bags on the live robot's timeline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('robosuite', reason='robosuite is not installed')

from rosbags.highlevel import AnyReader

from tts_policy.policy.bundle import load_bundle
from tts_policy.policy.policy import TestTimeSparsePolicy
from tts_policy.sim import collect
from tts_policy.sim.demonstration import FRAMES_AFTER_SUCCESS, demonstrate
from tts_policy.sim.lead import PolicyLead
from tts_policy.sim.panda import COMMAND_JOINTS, HOME_RAD, STATE_JOINTS
from tts_policy.sim.tasks.lift import LiftExpert

MS = 1_000_000
BUNDLE = Path(__file__).parents[2] / 'models' / 'panda_lift'


@pytest.fixture(scope='module')
def expert(world):
    return LiftExpert(world)


@pytest.mark.parametrize('noise_rad', [0.0, 0.01])
def test_the_expert_lifts_the_cube_in_a_moderate_number_of_frames(world, expert, noise_rad):
    for seed in range(300_000, 300_008):
        demonstration = demonstrate(world, expert, seed, noise_rad, pictures=False)
        assert demonstration.success, f'seed {seed}'
        assert 40 <= len(demonstration.commands) <= 90, f'seed {seed}'


def test_the_same_seed_gives_the_same_demonstration(world, expert):
    one, other = (demonstrate(world, expert, 11, 0.01, pictures=False) for _ in range(2))
    assert np.array_equal(one.states, other.states)
    assert np.array_equal(one.commands, other.commands)


def test_a_demonstration_rests_until_frame_one_and_holds_the_cube_up(world, expert):
    demonstration = demonstrate(world, expert, 12)
    commands, states = demonstration.commands, demonstration.states
    assert len(demonstration.images) == len(commands) == (len(states) - 1) // 5 + 1
    assert commands[0] == pytest.approx([*HOME_RAD, 0.04], abs=1e-3)
    assert np.abs(states[:6] - states[0]).max() < 1e-6
    assert (demonstration.images[0] != demonstration.images[1]).mean() < 0.01
    assert np.abs(commands[1] - commands[0]).max() > 1e-3
    assert (commands[-FRAMES_AFTER_SUCCESS // 2 :, 7] < 0.02).all()


def test_the_recorded_command_is_free_of_the_disturbance(world, expert):
    """From a disturbed state the command still is the expert's own for that state."""
    seed = 13
    disturbed = demonstrate(world, expert, seed, 0.02, pictures=False)
    clean = demonstrate(world, expert, seed, 0.0, pictures=False)
    assert disturbed.success
    assert not np.array_equal(disturbed.states[:100], clean.states[:100])
    roughness = [
        np.abs(np.diff(d.commands[2:30, :7], n=2, axis=0)).max() for d in (disturbed, clean)
    ]
    # A disturbance of 0.02 rad in the command itself would show as second differences of 0.04.
    assert roughness[0] < roughness[1] + 0.05


def test_noise_beyond_recovery_is_refused(world, expert):
    with pytest.raises(ValueError, match=r'noise_rad: expected 0 to 0.1 rad, got 1.0'):
        demonstrate(world, expert, 0, 1.0)


def lead(frames: int) -> PolicyLead:
    return PolicyLead(TestTimeSparsePolicy(load_bundle(BUNDLE), 'ddim10'), 0.8, frames)


def test_the_expert_takes_over_where_a_policy_has_led_the_arm(world, expert):
    seed, leader = 14, lead(24)
    led = demonstrate(world, expert, seed, lead=leader)
    assert not leader(world, seed)
    joints = world.joint_positions()
    assert led.success
    assert led.states[0] == pytest.approx([joints[name] for name in STATE_JOINTS], abs=0.0)
    assert np.array_equal(led.images[0], world.render())
    assert np.abs(led.states[0, :7] - HOME_RAD).max() > 0.05
    expert.reset()
    set_points = expert.set_points()
    assert led.commands[0] == pytest.approx([set_points[name] for name in COMMAND_JOINTS])


def test_how_long_a_policy_leads_depends_on_the_seed_alone():
    lengths = [lead(24).frames(seed) for seed in range(64)]
    assert lengths == [lead(24).frames(seed) for seed in range(64)]
    assert {min(lengths), max(lengths)} == {8, 24}


def test_a_policy_that_was_done_before_leaves_nothing_to_show(world, expert):
    def done(*_) -> bool:
        return True

    shown = demonstrate(world, expert, 14, lead=done)
    assert not shown.success
    assert len(shown) == len(shown.commands) == 0


def test_a_lead_that_is_no_bundle_is_refused(tmp_path, capsys):
    out = str(tmp_path / 'out')
    assert collect.main(['--lead', str(tmp_path), '--episodes', '1', '--out', out]) == 1
    error = capsys.readouterr().err
    assert 'model.yaml' in error
    assert error.count('\n') == 1


@pytest.mark.parametrize(('asked', 'longest'), [(None, 60), (90, 90)])
def test_a_lead_is_at_most_half_an_episode_or_as_long_as_was_asked(asked, longest):
    leader = collect.LeadChoice(BUNDLE, 'ddim10', 0.8, asked).load(frame_limit=120)
    assert max(leader.frames(seed) for seed in range(2000)) == longest


def test_a_lead_too_short_to_lead_anywhere_is_refused(tmp_path, capsys):
    arguments = ['--lead', str(BUNDLE), '--lead-frames', '3', '--episodes', '1']
    assert collect.main([*arguments, '--out', str(tmp_path / 'out')]) == 1
    assert 'lead: expected at least 8 frames, got 3' in capsys.readouterr().err


@pytest.fixture(scope='module')
def bags(tmp_path_factory):
    out = tmp_path_factory.mktemp('demonstrations')
    summary = collect.collect(2, 40, out, workers=1)
    return out, summary


def test_bags_hold_the_robots_topics_with_exact_stamps(bags):
    out, summary = bags
    bag = collect.episode_path(out, 40)
    stamps: dict[str, list[int]] = {}
    with AnyReader([bag]) as reader:
        for connection, written_ns, raw in reader.messages():
            message = reader.deserialize(raw, connection.msgtype)
            stamp = message.header.stamp
            assert stamp.sec * 10**9 + stamp.nanosec == written_ns
            stamps.setdefault(connection.topic, []).append(written_ns)
            if connection.topic == '/camera/image':
                assert (message.encoding, message.height, message.width) == ('rgb8', 96, 96)
                assert message.data.size == message.height * message.step
            elif connection.topic == '/joint_states':
                assert tuple(message.name) == STATE_JOINTS
                assert np.isfinite(message.position).all()
            else:
                assert tuple(message.joint_names) == COMMAND_JOINTS
                (point,) = message.points
                assert (point.time_from_start.sec, point.time_from_start.nanosec) == (0, 50 * MS)
                assert -1e-6 <= point.positions[-1] <= 0.04 + 1e-6
    assert set(stamps) == {'/camera/image', '/joint_states', '/joint_trajectory'}
    assert set(np.diff(stamps['/camera/image'])) == {50 * MS}
    assert set(np.diff(stamps['/joint_states'])) == {10 * MS}
    assert stamps['/joint_trajectory'] == stamps['/camera/image']
    assert set(stamps['/camera/image']) <= set(stamps['/joint_states'])
    assert collect.recorded_frames(bag) == len(stamps['/camera/image'])
    assert summary['frames']['total'] > len(stamps['/camera/image'])


def test_an_interrupted_collection_goes_on_where_it_stopped(bags):
    out, _ = bags
    before = {path.name: path.stat().st_mtime_ns for path in out.glob('episode_*')}
    leftover = out / '.episode_000042.partial'
    leftover.mkdir()
    summary = collect.collect(3, 40, out, workers=1)
    assert (summary['episodes'], summary['skipped']) == (3, 2)
    after = {path.name: path.stat().st_mtime_ns for path in out.glob('episode_*')}
    assert len(after) == 3
    assert before.items() <= after.items()
    assert not leftover.exists()
    assert json.loads((out / 'summary.json').read_text()) == summary


def test_a_folder_of_one_task_is_not_continued_with_another(bags):
    out, _ = bags
    with pytest.raises(ValueError, match="expected more demonstrations of 'lift', got 'can'"):
        collect.collect(3, 40, out, workers=1, task='can')


def test_seeds_kept_for_evaluation_are_refused(tmp_path, capsys):
    assert collect.main(['--seed', '100000', '--episodes', '1', '--out', str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert 'kept for evaluation' in error
    assert error.count('\n') == 1
