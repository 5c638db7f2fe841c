# SPDX-License-Identifier: Apache-2.0
"""demo: a simulated Panda driven over ROS 2 by the sparse policy, and by the dense one.

Starts robot_node and policy_node as processes in a ROS domain of their own, runs episodes of
unseen seeds, prints a table, and writes summary.json, plan.png and a video of one episode. The
exit status tells whether the episodes ran, not whether they succeeded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from tts_policy.sim.demo.processes import (
    HURRIED_S,
    OWED_LIMIT_S,
    PATIENT_S,
    DemoError,
    NodeProcess,
    prepare_environment,
    private_domain,
    share_directory,
    stop_all,
)
from tts_policy.sim.demo.variants import DemoBundle, Variant, choose_variants, read_bundle
from tts_policy.sim.tasks import PANDA_TASKS

if TYPE_CHECKING:
    from tts_policy.sim.demo.driver import EpisodeRecord

UNSEEN_SEED = 200_000
INTERRUPTED = 130
MOST_DROPPED = 0.1
# More than any joint can turn: no bound.
FIRST_POINT_RAD = 100.0
BAR_FORMAT = '{desc}: episode {n_fmt}/{total_fmt} |{bar:20}| {elapsed}{postfix}'


class Demo:
    """The processes and the driver of one run; leaving it ends them."""

    def __init__(self, options: argparse.Namespace, bundle: DemoBundle, share: Path) -> None:
        """Start the robot and the driver."""
        from tts_policy.sim.demo.driver import EpisodeDriver

        self._options = options
        self._bundle = bundle
        self._log = options.out / 'log'
        self._log.mkdir(parents=True, exist_ok=True)
        self._share = share
        domain = private_domain()
        prepare_environment(share, domain, self._log)
        self._policy: NodeProcess | None = None
        with ExitStack() as undo:
            self._driver = EpisodeDriver(domain, bundle.contract.action.joints, self._check)
            undo.callback(self._driver.close)
            self._robot = self._start_robot()
            undo.push(self._stop)
            self._undo = undo.pop_all()

    def __enter__(self) -> Demo:
        """Return itself."""
        return self

    def __exit__(self, *error: Any) -> None:
        """End all processes, in a hurry if there was an error or an interrupt."""
        self._undo.__exit__(*error)

    def _start_robot(self) -> NodeProcess:
        parameters = {
            'clock': 'realtime' if self._options.realtime else 'lockstep',
            'task': self._options.task,
            'action_period_s': self._bundle.deadline_s,
            'owed_timeout_s': OWED_LIMIT_S,
            # The policy and this process.
            'listeners': 2,
        }
        if self._options.episode_s is not None:
            parameters['episode_s'] = float(self._options.episode_s)
        return NodeProcess('tts_policy.sim.robot_node', parameters, self._log / 'robot_node.log')

    def start_policy(self, variant: Variant) -> None:
        """Replace the running policy node by one with the variant's sampler and sparsity."""
        if self._policy is not None:
            stop_all([self._policy], PATIENT_S)
            self._policy = None
            self._driver.await_policy_gone()
        parameters = {
            'bundle': str(self._bundle.path),
            'sampler': variant.sampler.name,
            'sparsity': float(variant.sparsity),
            'enable_output': True,
            'use_sim_time': not self._options.realtime,
            # In lockstep a lost message would never be published again.
            'reliable_sensors': not self._options.realtime,
            # The demo shows the deadlines that a sampler misses on this machine.
            'check_latency': False,
            # It also shows the jumps of a policy that is not good yet; nothing can break.
            'limits.first_point_default': FIRST_POINT_RAD,
            'inference_timeout_s': OWED_LIMIT_S,
        }
        log = self._log / f'policy_node_{variant.sampler.name}.log'
        limits = self._share / 'config' / 'panda_lift.yaml'
        self._policy = NodeProcess('tts_policy.node.policy_node', parameters, log, limits)
        if not self._driver.start_policy():
            raise self._policy.failure('policy_node could not be started')

    def raise_sparsity(self, variant: Variant) -> None:
        """Set the running policy's sparsity to the variant's."""
        self._driver.set_parameter('tts_policy', 'sparsity', float(variant.sparsity))

    def run_variant(self, variant: Variant) -> list[EpisodeRecord]:
        """Run the variant's episodes with a progress bar; returns their records."""
        self._driver.set_parameter('robot', 'seed', self._options.seed)
        records: list[EpisodeRecord] = []
        with tqdm(total=variant.episodes, desc=variant.title, bar_format=BAR_FORMAT) as bar:
            for _ in range(variant.episodes):
                seed = self._options.seed + len(records)

                def show(record: EpisodeRecord, seed: int = seed) -> None:
                    succeeded = sum(episode.success for episode in records)
                    bar.set_postfix_str(
                        f'seed {seed}, tick {len(record.ticks)}, done {succeeded}/{len(records)}'
                    )

                records.append(self._driver.run_episode(show))
                show(records[-1])
                bar.update()
                tqdm.write(_episode_line(len(records), variant.episodes, records[-1]))
        return records

    def _check(self) -> None:
        for process in (self._robot, self._policy):
            if process is not None:
                process.check()

    def _stop(self, error: object, *_: object) -> None:
        running = [process for process in (self._policy, self._robot) if process is not None]
        stop_all(running, PATIENT_S if error is None else HURRIED_S)


def _episode_line(number: int, of: int, record: EpisodeRecord) -> str:
    report = record.report
    latency_ms = [1e3 * tick['latency_s'] for tick in record.ticks]
    median = f'{np.median(latency_ms):.0f}' if latency_ms else '–'
    outcome = 'done' if record.success else f'failed ({report["reason"]})'
    refused = [tick['refused'] for tick in record.ticks if tick['refused']]
    return (
        f'  {number:2}/{of}  seed {record.seed}  {outcome} after {report["duration_s"]:.2f} s, '
        f'{len(record.ticks)} ticks, median latency {median} ms'
        + (f'; {len(refused)} chunks refused: {refused[-1]}' if refused else '')
    )


def run(options: argparse.Namespace) -> None:
    """Run the whole demo; raises DemoError."""
    began_s = time.monotonic()
    share = share_directory()
    path = options.bundle or share / PANDA_TASKS[options.task].bundle
    bundle = read_bundle(path.resolve())
    variants = choose_variants(
        bundle, options.sampler, options.sparsity, options.episodes, options.dense_episodes
    )
    options.out.mkdir(parents=True, exist_ok=True)
    clock = 'real clock' if options.realtime else 'lockstep'
    print(f'bundle {path}, {clock}, seeds from {options.seed} on; logs in {options.out / "log"}')
    records = []
    with Demo(options, bundle, share) as demo:
        for index, variant in enumerate(variants):
            if index == 0 or variant.sampler != variants[index - 1].sampler:
                print(f'starting the nodes for {variant.title} ...', flush=True)
                demo.start_policy(variant)
            else:
                demo.raise_sparsity(variant)
            records.append(demo.run_variant(variant))
    ran_s = time.monotonic() - began_s
    _report(options, bundle, variants, records, ran_s)
    _draw(options, bundle, variants, records)
    print(f'\n{time.monotonic() - began_s:.0f} s in all, episodes took {ran_s:.0f} s of it.')


def _report(
    options: argparse.Namespace,
    bundle: DemoBundle,
    variants: Sequence[Variant],
    records: Sequence[list[EpisodeRecord]],
    ran_s: float,
) -> None:
    """Print the table and write summary.json."""
    from tts_policy.sim.demo.variants import deadline_lines, summarise, table

    rows = [
        summarise(variant, of, bundle, options.realtime)
        for variant, of in zip(variants, records, strict=True)
    ]
    summary: dict[str, Any] = {
        variant.key: row for variant, row in zip(variants, rows, strict=True)
    }
    summary['setup'] = {
        'bundle': str(bundle.path),
        'clock': 'realtime' if options.realtime else 'lockstep',
        'first_seed': options.seed,
        'deadline_ms': round(1e3 * bundle.deadline_s, 3),
        'machine': platform.platform(),
        'cpus': os.cpu_count(),
        'wall_s': round(ran_s, 1),
    }
    (options.out / 'summary.json').write_text(json.dumps(summary, indent=2) + '\n')
    print(f'\n{table(variants, rows)}')
    print('\n' + deadline_lines(variants, rows, bundle.deadline_s, options.realtime))
    for variant, row in zip(variants, rows, strict=True):
        frames = sum(episode['frames'] for episode in row['per_episode'])
        dropped = sum(episode['dropped_frames'] for episode in row['per_episode'])
        if dropped > MOST_DROPPED * (frames + dropped):
            print(
                f'{variant.title}: the simulated camera dropped {dropped} of {frames + dropped} '
                f'frames, this machine is too busy for the real clock'
            )


def _draw(
    options: argparse.Namespace,
    bundle: DemoBundle,
    variants: Sequence[Variant],
    records: Sequence[list[EpisodeRecord]],
) -> None:
    """Write plan.png and the video of a sparse episode."""
    from tts_policy.sim.demo.pictures import PlanPanel, steady_tick, write_plans
    from tts_policy.sim.demo.video import Scene, write_video

    panels = []
    for variant, of in zip(variants, records, strict=True):
        shown = _shown(of)
        tick = steady_tick(shown)
        if variant.sparsity > 0.0 and tick is not None:
            panels.append(PlanPanel(variant, shown.seed, tick, shown.ticks[tick]))
    written = []
    if panels:
        written.append(write_plans(panels, options.out / 'plan.png'))
    else:
        print('no plan to draw: no sparse episode had a second tick', file=sys.stderr)
    shown = _shown(records[0])
    scene = Scene(shown, variants[0], bundle, 'real clock' if options.realtime else 'lockstep')
    written += write_video(scene, options.out)
    for path in (options.out / 'summary.json', *written):
        print(f'wrote {path}')


def _shown(records: Sequence[EpisodeRecord]) -> EpisodeRecord:
    """Return the first success, or the first episode of which there is something to see."""
    return max(records, key=lambda record: (record.success, min(len(record.ticks), 2)))


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Command line of `demo`."""
    parser = argparse.ArgumentParser(prog='demo', description=(__doc__ or '').split('\n')[0])
    parser.add_argument(
        '--task', choices=list(PANDA_TASKS), default='lift', help='(default: %(default)s)'
    )
    parser.add_argument('--bundle', type=Path, help="folder (default: the task's in models/)")
    parser.add_argument('--episodes', type=int, default=10, help='of the sparse policy')
    parser.add_argument('--dense-episodes', type=int, default=3, help='of the dense policy')
    parser.add_argument('--seed', type=int, default=UNSEEN_SEED, help='first seed')
    parser.add_argument('--sampler', default='ddim10', help='of the sparse policy')
    parser.add_argument(
        '--sparsity', type=float, help="share reused (default: the bundle's recommendation)"
    )
    parser.add_argument(
        '--episode-s', type=float, help="time limit of an episode (default: the task's)"
    )
    parser.add_argument('--realtime', action='store_true', help='real clock instead of lockstep')
    parser.add_argument('--out', type=Path, default=Path('out/demo'))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Console command demo."""
    options = parse_arguments(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        run(options)
    except DemoError as error:
        print(f'demo: {error}', file=sys.stderr)
        for line in error.log:
            print(f'  {line}', file=sys.stderr)
        return 1
    except (ImportError, OSError) as error:
        print(f'demo: {type(error).__name__}: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('demo: interrupted, all processes ended', file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == '__main__':
    sys.exit(main())
