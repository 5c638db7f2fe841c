# SPDX-License-Identifier: Apache-2.0
"""What added latency costs in simulation: success, time and smoothness, compensated and not.

    python bench/added_latency.py models/panda_lift --episodes 30 --out out/added_latency
    python bench/added_latency.py BUNDLE --task stack --sparsity 0 --out out/added_latency_stack

A chunk reaches the robot some milliseconds after its observation, in simulated time. Until then
the arm follows the previous chunk. A variant is MODE:MILLISECONDS, with one of these modes:

- dropped: set-points that are already past are dropped, as the node does;
- blended: the same, and the new chunk is blended in;
- held: the chunk is denoised around the set-points that will be past when it arrives;
- held_soft: the same, and later set-points are pulled towards the previous chunk;
- shifted: no compensation; the chunk is played from its first set-point when it arrives.

All variants run the same seeds with the same noise. An interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from machine import describe_machine
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
class Variant:
    """How late a chunk comes, and how the delay is compensated."""

    mode: str
    latency_ns: int

    @property
    def name(self) -> str:
        """Return the name as given on the command line."""
        return f'{self.mode}:{self.latency_ns // 1_000_000}'

    @staticmethod
    def parse(text: str) -> Variant:
        """Inverse of `name`; raises argparse.ArgumentTypeError."""
        mode, _, milliseconds = text.partition(':')
        if mode not in MODES or not milliseconds.isdigit():
            raise argparse.ArgumentTypeError(
                f'variant: expected MODE:MILLISECONDS with one of {", ".join(MODES)}, got {text!r}'
            )
        return Variant(mode, int(milliseconds) * 1_000_000)


class PlayerSink:
    """Sends trajectories to the controller of an episode."""

    following = True

    def __init__(self, episode: Episode) -> None:
        self._episode = episode

    def send(self, trajectory: Trajectory) -> None:
        """Let the controller follow the trajectory."""
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
        """Do nothing: the controller has taken the trajectory already."""


def make_output(contract: PolicyContract, episode: Episode, variant: Variant) -> CommandOutput:
    """Return the node's output stage, without limits."""
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
    output.blend_ns = BLEND_NS if variant.mode == 'blended' else 0
    return output


def run_episode(
    policy: TestTimeSparsePolicy,
    world: World,
    variant: Variant,
    seed: int,
    sparsity: float,
    limit_ns: int,
) -> dict[str, Any]:
    """Run one episode in which every chunk arrives `latency_ns` after its observation."""
    contract = policy.contract
    joints = contract.action.joints
    policy.reset(seed)
    # Stamps count from 1 s: 0 means now to a controller.
    timeline = Timeline(contract.action.execute * FRAME_NS, limit_ns)
    episode = Episode(world, seed, 1_000_000_000, timeline)
    output = make_output(contract, episode, variant)
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
            if variant.mode in ('held', 'held_soft'):
                committed = output.committed(
                    now_ns, variant.latency_ns, True, variant.mode == 'held_soft'
                )
            in_flight.append((now_ns, policy.act(window, sparsity, committed).actions))
        while in_flight and in_flight[0][0] + variant.latency_ns <= now_ns:
            stamp_ns, actions = in_flight.popleft()
            try:
                stamp_ns = now_ns if variant.mode == 'shifted' else stamp_ns
                sent.append(output.send(actions, stamp_ns, now_ns, True).continuity)
            except ChunkTooLate:
                too_late += 1
        episode.step()
    return {
        'variant': variant.name,
        'seed': seed,
        'success': episode.success,
        'duration_s': round(episode.elapsed_ns * 1e-9, 3),
        'too_late': too_late,
        'continuity': [asdict(value) for value in sent[1:]],
    }


def summarise(
    variant: Variant, episodes: list[dict[str, Any]], within_s: list[float]
) -> dict[str, Any]:
    """Return success with its interval, and medians over all chunks but the first.

    within: the successes that shorter time limits, in seconds, would have left.
    """
    successes = sum(episode['success'] for episode in episodes)
    low, high = wilson_interval(successes, len(episodes))
    chunks = [chunk for episode in episodes for chunk in episode['continuity']]
    row: dict[str, Any] = {
        'variant': variant.name,
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
    """Run the missing episodes, print the table and write results.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('bundle', type=Path)
    parser.add_argument('--variants', nargs='+', type=Variant.parse, default=[
        Variant(mode, ms * 1_000_000) for ms in (0, 100, 200, 300) for mode in MODES
        if ms or mode == 'dropped'
    ])  # fmt: skip
    parser.add_argument('--task', choices=list(PANDA_TASKS), default='lift')
    parser.add_argument(
        '--within', nargs='+', type=float, default=[2.0, 2.5, 3.0, 4.0], metavar='S',
        help='count the successes within shorter time limits as well',
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
                done[episode['variant'], episode['seed']] = episode
    seeds = range(args.seed, args.seed + args.episodes)
    jobs = [
        (variant, s) for s in seeds for variant in args.variants if (variant.name, s) not in done
    ]
    task = panda_task(args.task)
    world, limit_ns = task.world(), task.frame_limit * FRAME_NS
    try:
        with log.open('a') as handle:
            for variant, seed in tqdm(jobs, unit='episode', mininterval=5):
                episode = run_episode(policy, world, variant, seed, args.sparsity, limit_ns)
                done[variant.name, seed] = episode = {'task': args.task, **episode}
                handle.write(json.dumps(episode) + '\n')
                handle.flush()
    except KeyboardInterrupt:
        print('interrupted; next: run the same command again to continue')
        return 130
    finally:
        world.close()
    rows = [
        summarise(variant, [done[variant.name, seed] for seed in seeds], args.within)
        for variant in args.variants
    ]
    report = {
        'command': ' '.join(['python', *sys.argv]),
        'machine': describe_machine('cpu'),
        'rows': rows,
    }
    file = args.out / 'results.json'
    file.write_text(json.dumps(report, indent=2) + '\n')
    for row in rows:
        print(' '.join(f'{name} {value}' for name, value in row.items()))
    print(f'wrote {file}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
