# SPDX-License-Identifier: Apache-2.0
"""`evaluate_lift`: success of a bundle on unseen seeds, headless, in parallel and resumable.

An arm is SAMPLER:SPARSITY, with `:blind` appended for the control whose camera shows another
episode. All arms run the same seeds, and the noise of an episode depends on its seed alone.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tts_policy.core.bundle import BundleError
from tts_policy.sim.episode import Robot


@dataclass(frozen=True)
class Arm:
    """One way to run the policy."""

    sampler: str
    sparsity: float
    blind: bool = False

    @property
    def name(self) -> str:
        """Name as given on the command line."""
        return f'{self.sampler}:{self.sparsity:g}' + (':blind' if self.blind else '')

    @staticmethod
    def parse(text: str) -> Arm:
        """Inverse of `name`; raises argparse.ArgumentTypeError."""
        parts = text.split(':')
        try:
            if len(parts) not in (2, 3) or parts[2:] not in ([], ['blind']):
                raise ValueError
            return Arm(parts[0], float(parts[1]), len(parts) == 3)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f'an arm is SAMPLER:SPARSITY or SAMPLER:SPARSITY:blind, got {text!r}'
            ) from None


def wilson_interval(successes: int, episodes: int) -> tuple[float, float]:
    """95 % Wilson score interval of a success rate."""
    z = 1.959964
    rate = successes / episodes
    centre = rate + z * z / (2 * episodes)
    spread = z * math.sqrt(rate * (1 - rate) / episodes + z * z / (4 * episodes**2))
    scale = 1 + z * z / episodes
    return (centre - spread) / scale, (centre + spread) / scale


class _Worker:
    """Policies and worlds of one process, made when first needed."""

    def __init__(self, bundle: Path) -> None:
        from tts_policy.core.policy import TestTimeSparsePolicy
        from tts_policy.sim.lift import LiftWorld
        from tts_policy.sim.rollout import DeceivedRobot

        self._load = lambda sampler: TestTimeSparsePolicy.from_bundle(bundle, sampler, threads=1)
        self._worlds: dict[bool, Callable[[], Robot]] = {
            False: LiftWorld,
            True: lambda: DeceivedRobot(LiftWorld(), LiftWorld()),
        }
        self._ready: dict[Any, Any] = {}

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self._ready:
            self._ready[key] = make()
        return self._ready[key]

    def run(self, arm: Arm, seed: int) -> dict[str, Any]:
        from tts_policy.sim.rollout import run_episode

        policy = self._once(arm.sampler, lambda: self._load(arm.sampler))
        world = self._once(arm.blind, self._worlds[arm.blind])
        rollout = run_episode(policy, world, seed, arm.sparsity)
        stats = [chunk.stats for chunk in rollout.chunks]
        return {
            'arm': arm.name,
            'seed': seed,
            'success': rollout.success,
            'duration_s': round(rollout.duration_s, 3),
            'ticks': len(stats),
            'latency_ms': [round(1e3 * s.latency_s, 3) for s in stats],
            'sparsity': [s.sparsity for s in stats],
            'flops': [s.flops for s in stats],
            'dense_flops': stats[0].dense_flops,
        }


_worker: _Worker | None = None


def _start_worker(bundle: Path) -> None:
    global _worker
    _worker = _Worker(bundle)


def _run(job: tuple[Arm, int]) -> dict[str, Any]:
    assert _worker is not None
    return _worker.run(*job)


def summarise(arm: Arm, episodes: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the results; steady state leaves out the dense first tick of every episode."""
    successes = sum(e['success'] for e in episodes)
    low, high = wilson_interval(successes, len(episodes))
    latency = np.concatenate([e['latency_ms'] for e in episodes])
    steady = np.concatenate([e['flops'][1:] for e in episodes])
    dense = episodes[0]['dense_flops']
    return {
        'arm': arm.name,
        'episodes': len(episodes),
        'successes': successes,
        'ci95': [round(low, 4), round(high, 4)],
        'failed_seeds': sorted(e['seed'] for e in episodes if not e['success']),
        'ticks_mean': float(np.mean([e['ticks'] for e in episodes])),
        'sparsity_steady': float(np.mean(np.concatenate([e['sparsity'][1:] for e in episodes]))),
        'flops_ratio_steady': float(steady.mean() / dense),
        'flops_ratio_episode': float(
            np.mean(np.concatenate([e['flops'] for e in episodes])) / dense
        ),
        'latency_ms': {
            'p50': float(np.percentile(latency, 50)),
            'p95': float(np.percentile(latency, 95)),
        },
    }


def _read_done(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    done = {}
    if path.exists():
        for line in path.read_text().splitlines():
            episode = json.loads(line)
            done[episode['arm'], episode['seed']] = episode
    return done


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line of `evaluate_lift`."""
    parser = argparse.ArgumentParser(prog='evaluate_lift', description=__doc__.split('\n')[0])
    parser.add_argument('arms', nargs='+', type=Arm.parse, help='e.g. ddpm100:0 ddim10:0.8')
    parser.add_argument('--bundle', type=Path, required=True)
    parser.add_argument('--episodes', type=int, default=100)
    parser.add_argument('--seed', type=int, default=100_000, help='first seed')
    parser.add_argument('--workers', type=int, default=os.cpu_count() or 1)
    parser.add_argument('--out', type=Path, required=True, help='episodes.jsonl and results.json')
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, write results.json, print the table; returns the exit status."""
    args = parse_arguments(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / 'episodes.jsonl'
    done = _read_done(log)
    seeds = range(args.seed, args.seed + args.episodes)
    jobs = [(arm, seed) for arm in args.arms for seed in seeds if (arm.name, seed) not in done]
    context = multiprocessing.get_context('spawn')
    try:
        with (
            context.Pool(args.workers, _start_worker, (args.bundle,)) as pool,
            log.open('a') as handle,
            tqdm(total=len(jobs), unit='episode', mininterval=5) as bar,
        ):
            for episode in pool.imap_unordered(_run, jobs):
                done[episode['arm'], episode['seed']] = episode
                handle.write(json.dumps(episode) + '\n')
                handle.flush()
                bar.update()
    except BundleError as error:
        print(f'evaluate_lift: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted; run the same command again to go on')
        return 130
    rows = [summarise(arm, [done[arm.name, seed] for seed in seeds]) for arm in args.arms]
    (args.out / 'results.json').write_text(json.dumps(rows, indent=2) + '\n')
    for row in rows:
        latency = row['latency_ms']
        print(
            f'{row["arm"]:24} {row["successes"]:4}/{row["episodes"]:<4} '
            f'FLOPs {row["flops_ratio_steady"]:.3f} steady, {row["flops_ratio_episode"]:.3f} all; '
            f'latency p50 {latency["p50"]:.1f} p95 {latency["p95"]:.1f} ms'
        )
    return 0


if __name__ == '__main__':
    sys.exit(main())
