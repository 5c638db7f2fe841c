# SPDX-License-Identifier: Apache-2.0
"""The node in a process of its own, with a real bundle, over real topics and services."""

from __future__ import annotations

import signal
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')
pytest.importorskip('torch', reason='torch is not installed')

from feeder import JOINTS, Feeder
from processes import BUSY_FACTOR, END_LIMIT_S, RosProcess, wait_until
from trajectory_msgs.msg import JointTrajectory

from tts_policy.control.conversions import time_to_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rclpy.node import Node

MODULE = 'tts_policy.node.policy_node'
PERIOD_NS = 50_000_000
INTERVAL_NS = 8 * PERIOD_NS


def parameter_arguments(**values: object) -> list[str]:
    """Return --ros-args for parameters; an untrained policy starts anywhere."""
    arguments = ['--ros-args', '-p', 'limits.first_point_default:=9.0']
    # Nor does the scripted robot move.
    arguments += ['-p', 'limits.allow_unbounded:=true', '-p', 'frozen_joints_s:=0.0']
    for name, value in values.items():
        arguments += ['-p', f'{name.replace("__", ".")}:={value}']
    return arguments


@pytest.fixture(scope='module')
def feeder(test_node: Node) -> Feeder:
    return Feeder(test_node)


@pytest.fixture
def live(
    feeder: Feeder, small_bundle: Path, start_process: Callable[..., RosProcess]
) -> Iterator[RosProcess]:
    """Start a node that commands the scripted robot."""
    process = start_process(
        MODULE,
        *parameter_arguments(
            bundle=small_bundle, autostart='true', enable_output='true', gap_limit_s=2.0
        ),
    )
    feeder.forget()
    wait_until(lambda: feeder.matched, 20, f'subscriptions\n{process.output}')
    feeder.start()
    yield process
    feeder.stop()


def test_commands_follow_the_observations_and_stop_with_a_hold_on_sigint(
    live: RosProcess, feeder: Feeder
) -> None:
    wait_until(lambda: len(feeder.ticks) >= 4, 10, f'four chunks\n{live.output}')
    ticks = feeder.ticks[:4]
    stamps = [tick['stamp_ns'] for tick in ticks]

    def chunks_of_the_ticks() -> list[JointTrajectory]:
        found = {time_to_ns(chunk.header.stamp): chunk for chunk in feeder.commands}
        return [found[stamp] for stamp in stamps] if set(stamps) <= set(found) else []

    chunks = wait_until(chunks_of_the_ticks, 3, 'the chunks of the ticks')
    for earlier, later in pairwise(stamps):
        # A machine that is busy may skip frames, and never makes a tick early.
        assert later - earlier >= INTERVAL_NS - PERIOD_NS
    for chunk, tick in zip(chunks, ticks, strict=True):
        assert chunk.joint_names == list(JOINTS)
        times = [time_to_ns(point.time_from_start) for point in chunk.points]
        assert times == [PERIOD_NS * (a + 1) for a in range(15)][tick['dropped_points'] :]
        assert chunk.points[-1].velocities.tolist() == [0.0, 0.0, 0.0]
    assert ticks[0]['reset'] == 'activate'
    assert ticks[0]['sparsity'] == 0.0
    assert [tick['sparsity'] for tick in ticks[1:]] == pytest.approx([0.8] * 3, abs=0.01)
    assert len(ticks[0]['plan']) == 10

    live.send(signal.SIGINT)
    assert live.wait(BUSY_FACTOR * END_LIMIT_S) == 0, live.output
    hold = wait_until(
        lambda: feeder.commands[-1] if len(feeder.commands[-1].points) == 1 else None, 2, 'hold'
    )
    assert hold.points[0].positions.tolist() == [0.3, 0.2, 0.1]
    assert hold.points[0].velocities.tolist() == [0.0, 0.0, 0.0]


def test_parameters_reset_gate_and_lifecycle_of_a_running_node(
    live: RosProcess, feeder: Feeder
) -> None:
    wait_until(lambda: len(feeder.ticks) >= 2, 10, f'ticks\n{live.output}')

    # sparsity is live, and bad values are refused with the reason
    assert feeder.set(sparsity=0.6) == ''
    wait_until(lambda: feeder.ticks[-1]['requested_sparsity'] == 0.6, 3, 'sparsity 0.6')
    assert 'out of range' in feeder.set(sparsity=1.5)
    assert 'sparsity: expected a number in [0, 0.9]' in feeder.set(sparsity=0.95)
    assert 'DOUBLE' in feeder.set(sparsity='high')
    assert 'DOUBLE' in feeder.set(sparsity=1)
    assert 'n_execute: expected at most the 15' in feeder.set(n_execute=16)
    assert 'fixed while the node is configured' in feeder.set(bundle='/elsewhere')
    assert feeder.set(autostart=False) != ''
    assert 'use_sim_time: expected an unconfigured node' in feeder.set(use_sim_time=True)
    assert feeder.set(use_sim_time=False) == ''
    description = feeder.describe('max_observation_age_s')
    assert '[s]' in description.description
    assert description.floating_point_range[0].to_value == 60.0
    wait_until(lambda: feeder.ticks[-1]['sparsity'] == pytest.approx(0.6, abs=0.01), 3, '0.6')

    # a reset makes the next tick dense, once
    seen = len(feeder.ticks)
    assert feeder.reset().success
    wait_until(lambda: len(feeder.ticks) >= seen + 2, 3, 'ticks after the reset')
    after = [tick for tick in feeder.ticks[seen:] if tick['reset'] == 'service']
    assert [tick['sparsity'] for tick in after] == [0.0]

    # the replan interval is live
    assert feeder.set(n_execute=2) == ''
    seen = len(feeder.ticks)
    wait_until(lambda: len(feeder.ticks) >= seen + 4, 3, 'ticks')
    wait_until(
        lambda: any(
            later['stamp_ns'] - earlier['stamp_ns'] <= 3 * PERIOD_NS
            for earlier, later in pairwise(feeder.ticks[seen:])
        ),
        3,
        'ticks two periods apart',
    )

    # chunks that continue the old one are live too
    assert 'hold_committed: expected one of' in feeder.set(hold_committed='firmly')
    assert feeder.set(hold_committed='soft') == ''
    seen = len(feeder.ticks)
    wait_until(lambda: len(feeder.ticks) >= seen + 3, 3, 'ticks')
    assert all(tick['refused'] is None for tick in feeder.ticks[seen:])
    assert feeder.set(hold_committed='none') == ''

    # a gap in the stamps resets the policy
    feeder.stop()
    seen = len(feeder.ticks)
    time.sleep(2.2)
    feeder.start()
    wait_until(
        lambda: any('gap' in (tick['reset'] or '') for tick in feeder.ticks[seen:]),
        3,
        'a tick after the gap',
    )

    # closing the gate holds once, then only proposals come
    assert feeder.set(enable_output=False) == ''
    wait_until(lambda: len(feeder.commands[-1].points) == 1, 2, 'hold')
    commands, proposals = len(feeder.commands), len(feeder.proposals)
    wait_until(lambda: len(feeder.proposals) >= proposals + 2, 3, 'proposals')
    assert len(feeder.commands) == commands

    # lifecycle: down and up again
    assert feeder.set(enable_output=True) == ''
    wait_until(lambda: len(feeder.commands) > commands, 3, 'commands')
    assert feeder.change('deactivate')
    wait_until(lambda: len(feeder.commands[-1].points) == 1, 2, 'hold')
    commands = len(feeder.commands)
    time.sleep(0.5)
    assert len(feeder.commands) == commands
    assert feeder.change('cleanup')
    assert feeder.state() == 'unconfigured'
    assert feeder.change('configure')
    assert feeder.change('activate')
    wait_until(lambda: len(feeder.commands) > commands, 5, f'commands\n{live.output}')
    told = {'latency_p50_ms', 'latency_p99_ms', 'deadline_misses', 'realised_sparsity'}
    wait_until(
        lambda: feeder.values().get('state') == 'active' and told <= set(feeder.values()),
        3,
        'a status with statistics',
    )


def test_simulated_time_ticks_at_exact_stamps_and_starts_anew_when_it_jumps_back(
    feeder: Feeder, small_bundle: Path, start_process: Callable[..., RosProcess]
) -> None:
    process = start_process(
        MODULE,
        *parameter_arguments(
            bundle=small_bundle,
            autostart='true',
            enable_output='true',
            use_sim_time='true',
            reliable_sensors='true',
        ),
    )
    feeder.forget()
    wait_until(lambda: feeder.matched, 20, f'subscriptions\n{process.output}')

    def episode(start_ns: int, ticks: int) -> None:
        """Publish frames in lockstep: time stands still until a tick was answered."""
        feeder.forget()
        for step in range(5 * (1 + 8 * (ticks - 1)) + 1):
            stamp_ns = start_ns + step * 10_000_000
            frame, inside = divmod(step, 5)
            feeder.publish_clock(stamp_ns)
            feeder.publish(stamp_ns, picture=inside == 0)
            if inside == 0 and frame % 8 == 1:
                wait_until(
                    lambda stamp=stamp_ns: (
                        feeder.publish_clock(stamp)
                        or any(time_to_ns(c.header.stamp) == stamp for c in feeder.commands)
                    ),
                    5,
                    f'command for {stamp_ns}\n{process.output}',
                )
        wait_until(lambda: len(feeder.ticks) == ticks, 2, 'statistics')
        expected = [start_ns + PERIOD_NS + n * INTERVAL_NS for n in range(ticks)]
        assert [tick['stamp_ns'] for tick in feeder.ticks] == expected
        assert feeder.ticks[0]['sparsity'] == 0.0
        assert all(tick['sparsity'] > 0.5 for tick in feeder.ticks[1:])
        assert all(tick['dropped_points'] == 0 for tick in feeder.ticks)
        assert not any(tick['deadline_miss'] for tick in feeder.ticks)

    second = 1_000_000_000
    episode(1 * second, 3)
    episode(30 * second, 3)
    assert 'gap' in feeder.ticks[0]['reset']
    episode(2 * second, 3)
    assert 'backward' in feeder.ticks[0]['reset']


def test_a_busy_node_ends_within_two_seconds_of_sigterm(
    feeder: Feeder, small_bundle: Path, start_process: Callable[..., RosProcess]
) -> None:
    process = start_process(
        MODULE,
        *parameter_arguments(
            bundle=small_bundle, sampler='ddpm100', autostart='true', check_latency='false'
        ),
    )
    feeder.forget()
    wait_until(lambda: feeder.matched, 20, f'subscriptions\n{process.output}')
    feeder.start()
    try:
        wait_until(lambda: feeder.ticks, 10, f'a tick\n{process.output}')
        process.send(signal.SIGTERM)
        assert process.wait(BUSY_FACTOR * END_LIMIT_S) == 0, process.output
    finally:
        feeder.stop()
    assert not feeder.commands


@pytest.mark.parametrize('value', ['high', '1.5', '-0.1', '1'])
def test_a_bad_sparsity_at_the_start_ends_the_process_with_one_line(
    value: str, start_process: Callable[..., RosProcess]
) -> None:
    process = start_process(MODULE, *parameter_arguments(sparsity=value))
    assert process.wait(20.0) == 1
    assert 'sparsity: ' in process.output
    assert value in process.output
    assert 'Traceback' not in process.output
