# SPDX-License-Identifier: Apache-2.0
"""Any sequence of sends and holds against an independent judge of what reaches the robot.

The judge knows the messages only: it runs the cubics that a controller would run and uses none of
the code under test.
"""

from __future__ import annotations

import numpy as np
import pytest
from output_bench import Recorder
from scipy.interpolate import CubicHermiteSpline

from tts_policy.control.limits import JointLimits, LimitSource
from tts_policy.control.output import ChunkTiming, CommandOutput, HoldRule
from tts_policy.control.trajectory import NO_STAMP, Trajectory, TrajectoryRefused

JOINTS = ('a', 'b', 'grip')
PERIOD = 50_000_000
T0 = 1_700_000_000_000_000_000
HOLD_NS = 100_000_000
LOWER, UPPER = np.array([-1.0, -0.5, 0.0]), np.array([1.0, 0.8, 0.5])
VELOCITY, ACCELERATION, FIRST = np.array([1.0, 1.5, 2.0]), 12.0, 0.3
TOLERANCE = 0.05
LEAD_NS = 5_000_000


class Judge:
    """Follows the commands as a controller does and checks every one of them."""

    def __init__(self, position: np.ndarray, acceleration: float) -> None:
        self.path: CubicHermiteSpline | None = None
        self.begin_ns, self.end_ns, self.rest = T0, T0, position
        self.holds = self.sends = 0
        self.acceleration = acceleration

    def state(self, now_ns: int) -> tuple[np.ndarray, np.ndarray]:
        """Position and velocity that a controller is at."""
        if self.path is None or now_ns >= self.end_ns:
            return self.rest, np.zeros_like(self.rest)
        at_s = (now_ns - self.begin_ns) * 1e-9
        return self.path(at_s), self.path(at_s, 1)

    def judge(self, command: Trajectory, now_ns: int, measured: np.ndarray, hold: bool) -> None:
        """Check a command and follow it from now on."""
        starts_at_rest = self.path is None or now_ns > self.end_ns
        if starts_at_rest and not hold:
            self.rest = measured
        position, velocity = self.state(now_ns)
        stamp_ns = now_ns if command.stamp_ns == NO_STAMP else command.stamp_ns
        due_ns = stamp_ns + command.times_ns
        assert (np.diff(due_ns) > 0).all() and due_ns[0] > now_ns
        assert np.isfinite(command.positions).all() and np.isfinite(command.velocities).all()
        assert (command.velocities[-1] == 0.0).all()
        low, high = np.minimum(LOWER, position), np.maximum(UPPER, position)
        if not hold:
            assert (command.positions >= LOWER - 1e-9).all()
            assert (command.positions <= UPPER + 1e-9).all()
        self.follow(command, now_ns, due_ns, position, velocity)
        times_s = np.linspace(0.0, (due_ns[-1] - now_ns) * 1e-9, 8 * len(due_ns) + 1)
        path, speed = self.path(times_s), np.abs(self.path(times_s, 1))
        assert (path >= low - 1e-6).all() and (path <= high + 1e-6).all(), 'left the bounds'
        knots = np.concatenate([[position], command.positions])
        rates = np.abs(np.diff(knots, axis=0)) / (np.diff([now_ns, *due_ns]) * 1e-9)[:, None]
        if hold:
            # From whatever was in force to rest: no faster, and within the acceleration.
            bound = np.maximum(VELOCITY * (1 + TOLERANCE), np.abs(velocity))
            assert (speed <= bound + 1e-6).all(), 'a hold that speeds up'
            room = np.where(velocity > 0.0, high - position, position - low)
            # Where an even stop does not fit before a bound, the bound counts.
            fits = room >= np.abs(velocity) * (due_ns[-1] - now_ns) * 0.5e-9
            change = np.abs(self.path(times_s, 2)).max(axis=0)
            assert (change[fits] <= self.acceleration * (1 + TOLERANCE) + 1e-6).all(), 'too hard'
            self.holds += 1
        else:
            assert (rates[1:] <= VELOCITY * (1 + TOLERANCE) + 1e-6).all(), 'too fast'
            assert np.abs(command.positions[0] - measured).max() <= FIRST + 1e-9
            self.sends += 1

    def follow(
        self,
        command: Trajectory,
        now_ns: int,
        due_ns: np.ndarray,
        position: np.ndarray,
        velocity: np.ndarray,
    ) -> None:
        self.path = CubicHermiteSpline(
            (np.array([now_ns, *due_ns]) - now_ns) * 1e-9,
            np.concatenate([[position], command.positions]),
            np.concatenate([[velocity], command.velocities]),
        )
        self.begin_ns, self.end_ns = now_ns, int(due_ns[-1])
        self.rest = command.positions[-1]


def chunk(rng: np.random.Generator, start: np.ndarray) -> np.ndarray:
    """A smooth chunk near the bounds at times, a wild one now and then."""
    steps = np.arange(1, 16)[:, None] * PERIOD * 1e-9
    slope = rng.uniform(-1.1, 1.1, 3) * VELOCITY * rng.choice([0.2, 0.6, 1.0])
    bend = rng.uniform(-1.0, 1.0, 3) * ACCELERATION / 2 * rng.choice([0.0, 0.1, 1.0])
    actions = start + slope * steps + bend * steps**2 / 2
    if rng.random() < 0.6:
        actions = np.clip(actions, LOWER, UPPER)
    if rng.random() < 0.05:
        actions[rng.integers(15)] += rng.normal(0.0, 0.5, 3)
    if rng.random() < 0.02:
        actions[rng.integers(15), 0] = rng.choice([np.nan, np.inf, 1e39])
    return actions


def run(seed: int, events: int, accelerates: bool) -> Judge:
    """Sends and holds at random times on one arm; returns who judged them."""
    acceleration = ACCELERATION if accelerates else np.inf
    rng = np.random.default_rng(2 * seed + accelerates)
    command, proposed = Recorder(), Recorder()
    limits = JointLimits(
        JOINTS, LOWER, UPPER, VELOCITY,
        np.full(3, acceleration), np.full(3, FIRST), TOLERANCE,
    )  # fmt: skip
    output = CommandOutput(
        ChunkTiming(JOINTS, PERIOD, 1, LEAD_NS, 2),
        LimitSource(limits, 'off'),
        HoldRule(HOLD_NS, ('grip',) if rng.random() < 0.5 else (), 250_000_000),
        command,
        proposed,
    )
    output.blend_ns = int(rng.choice([0, 3 * PERIOD]))
    now_ns, stamp_ns = T0, T0
    where = rng.uniform(LOWER, UPPER)
    judge = Judge(where, acceleration)
    for _ in range(events):
        now_ns += int(rng.choice([1, 20, 60, 400])) * 1_000_000 + int(rng.integers(1_000_000))
        if judge.path is not None:
            where, _ = judge.state(now_ns)
        believed = where + rng.normal(0.0, 0.005, 3)
        glitch = rng.random()
        if glitch < 0.1:
            believed = where + rng.choice([-2.5, 2.5, 0.3]) * np.eye(3)[rng.integers(3)]
        elif glitch < 0.12:
            believed = np.full(3, 1e39)
        if rng.random() < 0.8:
            stamp_ns = now_ns - int(rng.integers(0, 60_000_000))
            output.measured(stamp_ns, believed, now_ns)
        newest = output._measured.positions if output._measured is not None else believed
        try:
            if rng.random() < 0.25:
                output.hold(now_ns)
            else:
                output.send(
                    chunk(rng, newest if rng.random() < 0.3 else where),
                    stamp_ns,
                    now_ns,
                    enabled=rng.random() < 0.9,
                )
        except TrajectoryRefused:
            pass
        for sink, hold in ((command.finished, True), (command.sent, False)):
            if sink:
                judge.judge(sink.pop(), now_ns, newest, hold)
    return judge


@pytest.mark.parametrize('accelerates', [False, True])
def test_no_sequence_of_sends_and_holds_leaves_the_limits(accelerates: bool) -> None:
    """Measured states glitch, chunks are wild, gates close: 22,000 events in all."""
    holds = sends = 0
    for seed in range(50):
        judge = run(seed, 220, accelerates)
        holds, sends = holds + judge.holds, sends + judge.sends
    assert holds > 1000 and sends > 1500
