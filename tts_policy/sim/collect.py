# SPDX-License-Identifier: Apache-2.0
"""collect_demos: demonstrations of the scripted expert as rosbag2 recordings.

One mcap bag per successful episode, `episode_SEED`, with the topics of the simulated robot and
header stamps in simulated time. A bag appears under its name only when it is complete, so an
interrupted run is continued by the same command. `contract.yaml` beside the bags says what a
policy trained on them sees and commands. Needs no ROS installation.

With --lead a policy moves the arm first, and the expert is recorded from where that has led; an
episode in which the policy was done before is left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore
from tqdm import tqdm

from tts_policy.data.worker_processes import worker_processes
from tts_policy.policy.contract import CONTRACT_FILE, write_contract
from tts_policy.policy.policy import TestTimeSparsePolicy
from tts_policy.sim.demonstration import Demonstration, demonstrate
from tts_policy.sim.expert import Expert
from tts_policy.sim.lead import PolicyLead
from tts_policy.sim.panda import (
    COMMAND_JOINTS,
    FRAME_NS,
    PANDA_CONTRACT,
    STATE_JOINTS,
    STATES_PER_FRAME,
    STEP_NS,
)
from tts_policy.sim.task import PandaTask
from tts_policy.sim.tasks import PANDA_TASKS, panda_task
from tts_policy.sim.world import World

IMAGE_TOPIC = '/camera/image'
STATE_TOPIC = '/joint_states'
COMMAND_TOPIC = '/joint_trajectory'
CAMERA_FRAME = 'camera'
START_NS = 1_000_000_000
EVALUATION_SEEDS_FROM = 100_000
DEFAULT_NOISE_RAD = 0.01


@dataclass(frozen=True)
class LeadChoice:
    """The policy that moves the arm before the expert does, and how it is run.

    max_frames: None for half of an episode's frames. A long lead shows failures alone, for a
    policy that succeeds is done before.
    """

    bundle: Path
    sampler: str | None = None
    sparsity: float = 0.0
    max_frames: int | None = None

    def load(self, frame_limit: int) -> PolicyLead:
        """Load the bundle, for episodes of `frame_limit` frames."""
        policy = TestTimeSparsePolicy.from_bundle(self.bundle, self.sampler)
        return PolicyLead(policy, self.sparsity, self.max_frames or frame_limit // 2)


@dataclass(frozen=True)
class Outcome:
    """What became of one seed: frames is 0 where there was no success of the expert to write."""

    seed: int
    frames: int
    skipped: bool = False


class _BagWriter:
    """Writes demonstrations with rosbags' own message types."""

    def __init__(self) -> None:
        self._store = get_typestore(Stores.ROS2_JAZZY)
        self._types = self._store.types

    def write(self, path: Path, demonstration: Demonstration) -> None:
        """Write a bag to path, which must not exist; messages in the order of their stamps."""
        with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
            connections = {
                topic: writer.add_connection(topic, name, typestore=self._store)
                for topic, name in (
                    (STATE_TOPIC, 'sensor_msgs/msg/JointState'),
                    (IMAGE_TOPIC, 'sensor_msgs/msg/Image'),
                    (COMMAND_TOPIC, 'trajectory_msgs/msg/JointTrajectory'),
                )
            }
            for topic, stamp_ns, message in self._messages(demonstration):
                raw = self._store.serialize_cdr(message, message.__msgtype__)
                writer.write(connections[topic], stamp_ns, raw)

    def _messages(self, demonstration: Demonstration) -> Iterator[tuple[str, int, Any]]:
        for index, state in enumerate(demonstration.states):
            stamp_ns = START_NS + index * STEP_NS
            yield STATE_TOPIC, stamp_ns, self._joint_state(stamp_ns, state)
            frame, rest = divmod(index, STATES_PER_FRAME)
            if rest == 0:
                yield IMAGE_TOPIC, stamp_ns, self._image(stamp_ns, demonstration.images[frame])
                yield (
                    COMMAND_TOPIC,
                    stamp_ns,
                    self._command(stamp_ns, demonstration.commands[frame]),
                )

    def _header(self, stamp_ns: int, frame_id: str = '') -> Any:
        seconds, nanoseconds = divmod(stamp_ns, 1_000_000_000)
        stamp = self._types['builtin_interfaces/msg/Time'](sec=seconds, nanosec=nanoseconds)
        return self._types['std_msgs/msg/Header'](stamp=stamp, frame_id=frame_id)

    def _joint_state(self, stamp_ns: int, positions: np.ndarray) -> Any:
        return self._types['sensor_msgs/msg/JointState'](
            header=self._header(stamp_ns),
            name=list(STATE_JOINTS),
            position=positions,
            velocity=np.zeros(0),
            effort=np.zeros(0),
        )

    def _image(self, stamp_ns: int, image: np.ndarray) -> Any:
        height, width, channels = image.shape
        return self._types['sensor_msgs/msg/Image'](
            header=self._header(stamp_ns, CAMERA_FRAME),
            height=height,
            width=width,
            encoding='rgb8',
            is_bigendian=0,
            step=width * channels,
            data=image.reshape(-1),
        )

    def _command(self, stamp_ns: int, positions: np.ndarray) -> Any:
        nothing = np.zeros(0)
        point = self._types['trajectory_msgs/msg/JointTrajectoryPoint'](
            positions=positions,
            velocities=nothing,
            accelerations=nothing,
            effort=nothing,
            time_from_start=self._types['builtin_interfaces/msg/Duration'](
                sec=0, nanosec=FRAME_NS
            ),
        )
        return self._types['trajectory_msgs/msg/JointTrajectory'](
            header=self._header(stamp_ns), joint_names=list(COMMAND_JOINTS), points=[point]
        )


def episode_path(out: Path, seed: int) -> Path:
    """Where the bag of a seed lies."""
    return out / f'episode_{seed:06d}'


def recorded_frames(bag: Path) -> int:
    """Frames of a complete bag, from its metadata."""
    import yaml

    information = yaml.safe_load((bag / 'metadata.yaml').read_text())
    for topic in information['rosbag2_bagfile_information']['topics_with_message_count']:
        if topic['topic_metadata']['name'] == IMAGE_TOPIC:
            return int(topic['message_count'])
    raise ValueError(f'{bag}: expected the topic {IMAGE_TOPIC}, got none')


class _Worker:
    """One process: a world, its expert and a writer, made once."""

    task: PandaTask
    world: World
    expert: Expert
    writer: _BagWriter
    lead: PolicyLead | None

    @classmethod
    def start(cls, task: str, lead: LeadChoice | None) -> None:
        torch.set_num_threads(1)
        cls.task = panda_task(task)
        cls.world = cls.task.world()
        cls.expert = cls.task.expert(cls.world)
        cls.writer = _BagWriter()
        cls.lead = lead.load(cls.task.frame_limit) if lead else None

    @classmethod
    def record(cls, seed: int, noise_rad: float, out: Path) -> Outcome:
        demonstration = demonstrate(
            cls.world,
            cls.expert,
            seed,
            noise_rad,
            frame_limit=cls.task.frame_limit,
            lead=cls.lead,
        )
        if not demonstration.success:
            return Outcome(seed, 0)
        final = episode_path(out, seed)
        partial = final.with_name(f'.{final.name}.partial')
        shutil.rmtree(partial, ignore_errors=True)
        cls.writer.write(partial, demonstration)
        # rosbag2 names the data file after the directory; the metadata follows the rename.
        data = partial / f'{partial.name}.mcap'
        data.rename(partial / f'{final.name}.mcap')
        metadata = partial / 'metadata.yaml'
        metadata.write_text(metadata.read_text().replace(data.name, f'{final.name}.mcap'))
        partial.rename(final)
        return Outcome(seed, len(demonstration))


def _outcomes(
    task: str,
    seeds: Iterator[int],
    episodes: int,
    noise_rad: float,
    out: Path,
    workers: int,
    lead: LeadChoice | None,
) -> Iterator[Outcome]:
    """Outcomes in the order of seeds, for as many seeds as are asked for."""
    with worker_processes(workers, _Worker.start, (task, lead)) as pool:
        pending: list[Any] = []
        done = 0
        while done < episodes:
            # Never more in flight than still needed: the set of bags depends on seeds alone.
            while len(pending) < min(2 * workers, episodes - done):
                seed = next(seeds)
                bag = episode_path(out, seed)
                if bag.is_dir():
                    pending.append(Outcome(seed, recorded_frames(bag), skipped=True))
                else:
                    pending.append(pool.submit(_Worker.record, seed, noise_rad, out))
            first = pending.pop(0)
            outcome = first if isinstance(first, Outcome) else first.result()
            done += outcome.frames > 0
            yield outcome


def _refuse_other_task(summary: Path, task: str) -> None:
    before = json.loads(summary.read_text()).get('task', task) if summary.is_file() else task
    if before != task:
        raise ValueError(
            f'{summary.parent}: expected more demonstrations of {before!r}, got {task!r}'
        )


def collect(
    episodes: int,
    seed: int,
    out: Path,
    noise_rad: float = DEFAULT_NOISE_RAD,
    workers: int = 2,
    task: str = 'lift',
    lead: LeadChoice | None = None,
) -> dict[str, Any]:
    """Record `episodes` successes of consecutive seeds from `seed` on; returns the summary.

    The summary is written to out/summary.json as well. Seeds from EVALUATION_SEEDS_FROM on are
    refused with a ValueError: they are kept for evaluation.
    """
    named = panda_task(task)
    if lead is not None:
        lead.load(named.frame_limit)  # refused here, not in a process of the pool
    if episodes < 1 or workers < 1:
        raise ValueError(f'episodes, workers: expected at least 1, got {episodes}, {workers}')
    if not 0 <= seed <= EVALUATION_SEEDS_FROM - 2 * episodes:
        raise ValueError(
            f'seed: expected 0 to {EVALUATION_SEEDS_FROM} - 2 episodes (those from '
            f'{EVALUATION_SEEDS_FROM} on are kept for evaluation), got {seed}'
        )
    out.mkdir(parents=True, exist_ok=True)
    _refuse_other_task(out / 'summary.json', task)
    write_contract(out / CONTRACT_FILE, PANDA_CONTRACT)
    started = time.monotonic()
    recorded: list[Outcome] = []
    failed: list[int] = []
    seeds = iter(range(seed, EVALUATION_SEEDS_FROM))
    with tqdm(total=episodes, desc='demonstrations', unit='bag') as bar:
        for outcome in _outcomes(task, seeds, episodes, noise_rad, out, workers, lead):
            if outcome.frames:
                recorded.append(outcome)
                bar.update()
            else:
                failed.append(outcome.seed)
            bar.set_postfix(failed=len(failed))
    frames = [outcome.frames for outcome in recorded]
    summary = {
        'task': task,
        'episodes': len(recorded),
        'failed_seeds': failed,
        'first_seed': seed,
        'last_seed': recorded[-1].seed,
        'noise_rad': noise_rad,
        'lead': None if lead is None else {**asdict(lead), 'bundle': lead.bundle.name},
        'frames': {'total': sum(frames), 'mean': float(np.mean(frames)), 'max': max(frames)},
        'skipped': sum(outcome.skipped for outcome in recorded),
        'wall_s': round(time.monotonic() - started, 1),
    }
    (out / 'summary.json').write_text(json.dumps(summary, indent=2) + '\n')
    return summary


def main(arguments: list[str] | None = None) -> int:
    """Console command collect_demos."""
    parser = argparse.ArgumentParser(prog='collect_demos', description=__doc__.splitlines()[0])
    parser.add_argument('--task', choices=list(PANDA_TASKS), default='lift')
    parser.add_argument('--episodes', type=int, default=200, help='successful episodes to record')
    parser.add_argument('--seed', type=int, default=0, help='first seed')
    parser.add_argument('--out', type=Path, required=True, help='directory of the bags')
    parser.add_argument(
        '--noise',
        type=float,
        default=DEFAULT_NOISE_RAD,
        metavar='RAD',
        help='disturbance of the executed commands (default %(default)s rad; 0 for none)',
    )
    parser.add_argument(
        '--lead',
        type=Path,
        metavar='BUNDLE',
        help='a policy that leads into situations of its own',
    )
    parser.add_argument('--lead-sampler', metavar='NAME', help="default the bundle's default")
    parser.add_argument('--lead-sparsity', type=float, default=0.0, metavar='S')
    parser.add_argument(
        '--lead-frames',
        type=int,
        metavar='N',
        help="the longest lead (default half of the task's limit); a long one shows what the "
        'policy does after a failure',
    )
    parser.add_argument('--workers', type=int, default=2, help='processes')
    options = parser.parse_args(arguments)
    lead = None
    if options.lead is not None:
        lead = LeadChoice(
            options.lead, options.lead_sampler, options.lead_sparsity, options.lead_frames
        )
    try:
        summary = collect(
            options.episodes,
            options.seed,
            options.out,
            options.noise,
            options.workers,
            options.task,
            lead,
        )
    except (ValueError, OSError, ImportError) as error:
        print(f'collect_demos: {error}', file=sys.stderr)
        return 1
    print(json.dumps(summary))
    return 0


if __name__ == '__main__':
    sys.exit(main())
