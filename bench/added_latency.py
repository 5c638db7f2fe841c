# SPDX-License-Identifier: Apache-2.0
"""What added latency costs in simulation: success, time and smoothness, compensated and not.

    python bench/added_latency.py models/panda_lift --episodes 30 --out out/added_latency
    python bench/added_latency.py BUNDLE --task stack --sparsity 0 --out out/added_latency_stack

A chunk reaches the robot LATENCY after its observation, in simulated time; the arm follows the old
one meanwhile. With compensation (`dropped`) the points already past are dropped, as the node does;
with `blended` they are, and the rest is led over from the old chunk; with `held` the chunk is
denoised around the set-points that will be past when it comes, with `held_soft` drawn towards the
rest of the old chunk too; without (`shifted`) the chunk is played from its first point when it
arrives. All arms run the same seeds with the same noise. An
arm is MODE:MILLISECONDS. Resumable: run the same command again to go on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from tts_policy.control.limits import OFF, JointLimits, LimitSource
from tts_policy.control.output import ChunkTiming, CommandOutput, HoldRule
from tts_policy.control.trajectory import ChunkTooLate, Trajectory
from tts_policy.evaluate.results import wilson_interval
from tts_policy.policy.policy import TestTimeSparsePolicy
from tts_policy.sim.episode import Episode, Timeline
from tts_policy.sim.panda import CAMERA_KEY, FRAME_NS
from tts_policy.sim.tasks import PANDA_TASKS, panda_task
from tts_policy.sim.trajectory_player import TrajectoryPoint

if TYPE_CHECKING:
    from tts_policy.control.continuity import Continuity
    from tts_policy.policy.contract import PolicyContract
    from tts_policy.sim.world import World

MODES = ('dropped', 'blended', 'held', 'held_soft', 'shifted')
BLEND_NS = 150_000_000


@dataclass(frozen=True)
class Arm:
    """How late a chunk comes, and what is done about it."""

    mode: str
    latency_ns: int

    @property
    def name(self) -> str:
        """Name as given on the command line."""
        return f'{self.mode}:{self.latency_ns // 1_000_000}'

    @staticmethod
    def parse(text: str) -> Arm:
        """Inverse of `name`; raises argparse.ArgumentTypeError."""
        mode, _, milliseconds = text.partition(':')
        if mode not in MODES or not milliseconds.isdigit():
            raise argparse.ArgumentTypeError(
                f'an arm is MODE:MILLISECONDS with a mode of {", ".join(MODES)}, got {text!r}'
            )
        return Arm(mode, int(milliseconds) * 1_000_000)


class PlayerSink:
    """Sends trajectories to the controller of an episode."""

    following = True

    def __init__(self, episode: Episode) -> None:
        self._episode = episode

    def send(self, trajectory: Trajectory) -> None:
        """Let the controller follow it."""
        points = [
            TrajectoryPoint(int(due), position.tolist(), velocity.tolist())
            for due, position, velocity in zip(
                trajectory.times_ns, trajectory.positions, trajectory.velocities, strict=True
            )
        ]
        self._episode.accept(trajectory.joints, points, trajectory.stamp_ns)

    def finish(self, trajectory: Trajectory) -> None:
        """Do as `send`."""
        self.send(trajectory)

    def settle(self) -> None:
        """It was taken at once."""


def make_output(contract: PolicyContract, episode: Episode, arm: Arm) -> CommandOutput:
    """Return the node's way from chunk to command, without limits."""
    action = contract.action
    period_ns = round(contract.observation.period_s * 1e9)
    sink = PlayerSink(episode)
    output = CommandOutput(
        ChunkTiming(action.joints, period_ns, action.offset_steps, 0, 1),
        LimitSource(JointLimits.unbounded(action.joints), OFF),
        HoldRule(period_ns, (), period_ns),
        sink,
        sink,
    )
    output.blend_ns = BLEND_NS if arm.mode == 'blended' else 0
    return output


def run_episode(
    policy: TestTimeSparsePolicy,
    world: World,
    arm: Arm,
    seed: int,
    sparsity: float,
    limit_ns: int,
) -> dict[str, Any]:
    """One episode; the chunk in flight is delivered `latency_ns` after its observation."""
    contract = policy.contract
    joints = contract.action.joints
    policy.reset(seed)
    # Stamps count from 1 s: 0 means now to a controller.
    timeline = Timeline(contract.action.execute * FRAME_NS, limit_ns)
    episode = Episode(world, seed, 1_000_000_000, timeline)
    output = make_output(contract, episode, arm)
    frames: deque[Any] = deque(maxlen=contract.observation.steps)
    states: deque[Any] = deque(maxlen=contract.observation.steps)
    in_flight: deque[tuple[int, np.ndarray]] = deque()
    sent: list[Continuity] = []
    too_late = 0
    while episode.ended is None:
        now_ns = episode.now_ns
        state = world.joint_positions()
        if episode.frame_due:
            frames.append(world.render())
            states.append([state[name] for name in contract.observation.joints])
        output.measured(now_ns, np.array([state[name] for name in joints]), now_ns)
        if episode.tick_due:
            window = {CAMERA_KEY: np.stack(frames), 'joints': np.array(states)}
            committed = None
            if arm.mode in ('held', 'held_soft'):
                committed = output.committed(now_ns, arm.latency_ns, True, arm.mode == 'held_soft')
            in_flight.append((now_ns, policy.act(window, sparsity, committed).actions))
        while in_flight and in_flight[0][0] + arm.latency_ns <= now_ns:
            stamp_ns, actions = in_flight.popleft()
            try:
                stamp_ns = now_ns if arm.mode == 'shifted' else stamp_ns
                sent.append(output.send(actions, stamp_ns, now_ns, True).continuity)
            except ChunkTooLate:
                too_late += 1
        episode.step()
    return {
        'arm': arm.name,
        'seed': seed,
        'success': episode.success,
        'duration_s': round(episode.elapsed_ns * 1e-9, 3),
        'too_late': too_late,
        'continuity': [asdict(value) for value in sent[1:]],
    }


def summarise(arm: Arm, episodes: list[dict[str, Any]], within_s: list[float]) -> dict[str, Any]:
    """One row: success with its interval, and medians over all chunks but the first.

    within: successes that would be left if the limit were so many seconds.
    """
    successes = sum(episode['success'] for episode in episodes)
    low, high = wilson_interval(successes, len(episodes))
    chunks = [chunk for episode in episodes for chunk in episode['continuity']]
    row: dict[str, Any] = {
        'arm': arm.name,
        'episodes': len(episodes),
        'successes': successes,
        'ci95': [round(low, 3), round(high, 3)],
        'within': {
            f'{limit_s:g} s': sum(e['success'] and e['duration_s'] <= limit_s for e in episodes)
            for limit_s in within_s
        },
        'too_late': sum(episode['too_late'] for episode in episodes),
        'duration_s': round(float(np.mean([e['duration_s'] for e in episodes])), 2),
    }
    for name in ('jump', 'velocity_jump', 'jerk'):
        row[name] = float(f'{np.median([chunk[name] for chunk in chunks]):.4g}')
    return row


def main() -> int:
    """Run what is missing, print the table, write results.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('bundle', type=Path)
    parser.add_argument('--arms', nargs='+', type=Arm.parse, default=[
        Arm(mode, ms * 1_000_000) for ms in (0, 100, 200, 300) for mode in MODES
        if ms or mode == 'dropped'
    ])  # fmt: skip
    parser.add_argument('--task', choices=list(PANDA_TASKS), default='lift')
    parser.add_argument(
        '--within', nargs='+', type=float, default=[2.0, 2.5, 3.0, 4.0], metavar='S',
        help='count the successes within shorter limits too',
    )  # fmt: skip
    parser.add_argument('--sampler', default='ddim10')
    parser.add_argument('--sparsity', type=float, default=0.8)
    parser.add_argument('--episodes', type=int, default=30)
    parser.add_argument('--seed', type=int, default=100_000, help='first seed')
    parser.add_argument('--out', type=Path, required=True, help='folder of the results')
    args = parser.parse_args()
    try:
        policy = TestTimeSparsePolicy.from_bundle(args.bundle, args.sampler, threads=1)
        policy.check_sparsity(args.sparsity)
    except ValueError as error:
        print(f'added_latency: {error}', file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / 'episodes.jsonl'
    done = {}
    if log.exists():
        for line in log.read_text().splitlines():
            episode = json.loads(line)
            if episode['task'] == args.task:
                done[episode['arm'], episode['seed']] = episode
    seeds = range(args.seed, args.seed + args.episodes)
    jobs = [(arm, s) for s in seeds for arm in args.arms if (arm.name, s) not in done]
    task = panda_task(args.task)
    world, limit_ns = task.world(), task.frame_limit * FRAME_NS
    try:
        with log.open('a') as handle:
            for arm, seed in tqdm(jobs, unit='episode', mininterval=5):
                episode = run_episode(policy, world, arm, seed, args.sparsity, limit_ns)
                done[arm.name, seed] = episode = {'task': args.task, **episode}
                handle.write(json.dumps(episode) + '\n')
                handle.flush()
    except KeyboardInterrupt:
        print('interrupted; run the same command again to go on')
        return 130
    finally:
        world.close()
    rows = [
        summarise(arm, [done[arm.name, seed] for seed in seeds], args.within) for arm in args.arms
    ]
    report = {'command': ' '.join(['python', *sys.argv]), 'cores': os.cpu_count(), 'rows': rows}
    (args.out / 'results.json').write_text(json.dumps(report, indent=2) + '\n')
    for row in rows:
        print(' '.join(f'{name} {value}' for name, value in row.items()))
    return 0


if __name__ == '__main__':
    sys.exit(main())
