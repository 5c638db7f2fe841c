# SPDX-License-Identifier: Apache-2.0
"""Run the policy node with a scripted robot against the real clock, for as long as you like.

    python bench/soak.py models/panda_lift --minutes 30 --n-execute 1 --out out/soak.json

The node runs in a process of its own. Camera frames come at the policy's period and joint states
five times as often, over real topics. The report has missed ticks and what came before each, the
age of the newest observation at publishing, the oldest cached feature, and the node's memory
after warm-up. On a computer with other work, --realtime-priority runs node and robot under
SCHED_FIFO, as policy.launch.py does with `realtime_priority`. The exit status is 1 if ticks were
missed, if memory grew by more than a megabyte a minute, or if a feature outlived its limit.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from machine import describe_machine
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String
from tqdm import tqdm

from tts_policy.node.messages import ns_to_time
from tts_policy.policy.bundle import Bundle, load_bundle
from tts_policy.policy.contract import PolicyContract

STATES_PER_FRAME = 5
WARM_UP_S = 30.0
PICTURES = 32
GROWTH_MB_A_MINUTE = 1.0
# If the scripted robot itself is later than this, a missed tick is not the node's fault.
LATE_FRAME_S = 0.02


class ScriptedRobot(Node):
    """Publishes random pictures and a slow motion, and keeps what the node reports."""

    def __init__(self, contract: PolicyContract) -> None:
        super().__init__('soak')
        self.ticks: list[dict[str, Any]] = []
        self.late_frames: list[tuple[int, float]] = []
        self.frames = 0
        observation = contract.observation
        self._joints = list(dict.fromkeys((*observation.joints, *contract.action.joints)))
        self._states = self.create_publisher(JointState, 'joint_states', 10)
        rng = np.random.default_rng(0)
        self._cameras = []
        for camera in observation.cameras:
            publisher = self.create_publisher(Image, f'{camera.key}/image', 10)
            shape = (PICTURES, camera.height, camera.width, 3)
            pictures = [
                Image(height=camera.height, width=camera.width, encoding='rgb8',
                      step=3 * camera.width, data=pixels.tobytes())
                for pixels in rng.integers(0, 256, shape, np.uint8)
            ]  # fmt: skip
            self._cameras.append((publisher, pictures))
        qos = QoSProfile(depth=1000)
        self.create_subscription(String, '/tts_policy/chunk_stats', self._on_tick, qos)

    def _on_tick(self, message: String) -> None:
        tick = json.loads(message.data)
        del tick['plan']
        self.ticks.append(tick)

    def publish(self, count: int, late_s: float) -> None:
        """Publish a joint state, and every fifth time a frame of every camera, `late_s` late."""
        stamp_ns = time.time_ns()
        stamp = ns_to_time(stamp_ns)
        if late_s > LATE_FRAME_S:
            self.late_frames.append((stamp_ns, late_s))
        state = JointState(
            name=self._joints, position=[0.1 * np.sin(count / 500)] * len(self._joints)
        )
        state.header.stamp = stamp
        self._states.publish(state)
        if count % STATES_PER_FRAME == 0:
            for publisher, pictures in self._cameras:
                picture = pictures[self.frames % PICTURES]
                picture.header.stamp = stamp
                publisher.publish(picture)
            self.frames += 1


def memory_mb(pid: int) -> float:
    """Return the resident memory of a process in MB."""
    for line in Path(f'/proc/{pid}/status').read_text().splitlines():
        if line.startswith('VmRSS:'):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f'/proc/{pid}/status: expected VmRSS, got none')


def run(args: argparse.Namespace, bundle: Bundle) -> dict[str, Any]:
    """Run node and robot; return the summary."""
    contract = bundle.network.contract
    robot = ScriptedRobot(contract)
    executor = SingleThreadedExecutor()
    executor.add_node(robot)
    ended = threading.Event()

    def spin() -> None:
        while not ended.is_set():
            executor.spin_once(timeout_sec=0.1)

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    node = start_node(args)
    memory: list[tuple[float, float]] = []
    period_s = contract.observation.period_s / STATES_PER_FRAME
    began_s = due_s = time.monotonic()
    end_s = began_s + WARM_UP_S + 60 * args.minutes
    first_tick, count, report_s = 0, 0, began_s
    try:
        with tqdm(total=round(end_s - began_s), unit='s', mininterval=10) as bar:
            while (now_s := time.monotonic()) < end_s:
                if node.poll() is not None:
                    raise RuntimeError(f'policy_node ended with status {node.returncode}')
                robot.publish(count, now_s - due_s)
                count += 1
                if now_s >= report_s:
                    memory.append((now_s - began_s, memory_mb(node.pid)))
                    bar.update(round(now_s - began_s) - bar.n)
                    report_s += 1.0
                    if now_s - began_s < WARM_UP_S:
                        first_tick = len(robot.ticks)
                due_s += period_s
                time.sleep(max(0.0, due_s - time.monotonic()))
    except KeyboardInterrupt:
        pass
    finally:
        node.send_signal(signal.SIGINT)
        node.wait(10.0)
        ended.set()
        thread.join()
        robot.destroy_node()
    warm = [sample for sample in memory if sample[0] >= WARM_UP_S]
    return summary(args, bundle, robot, first_tick, warm)


def start_node(args: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Start the node as a dry run."""
    values = {
        'bundle': args.bundle.resolve(),
        'sampler': args.sampler,
        'sparsity': args.sparsity,
        'n_execute': args.n_execute,
        'autostart': 'true',
        # The pictures are noise, so chunks begin far from the position that the robot reports.
        'limits.first_point_default': 1000.0,
        'limits.allow_unbounded': True,
        'frozen_joints_s': 0.0,
    }
    command = [sys.executable, '-m', 'tts_policy.node.policy_node', '--ros-args']
    if args.realtime_priority:
        command = ['chrt', '--fifo', str(args.realtime_priority), *command]
    for name, value in values.items():
        command += ['-p', f'{name}:={value}']
    environment = dict(os.environ)
    # The wheels of rclpy set the library path by running the interpreter anew, once.
    if environment.pop('_ROS_WHEELS_BOOTSTRAP_COMPLETE', None) is not None:
        environment.pop('LD_LIBRARY_PATH', None)
    return subprocess.Popen(command, env=environment)


def summary(
    args: argparse.Namespace,
    bundle: Bundle,
    robot: ScriptedRobot,
    first_tick: int,
    memory: list[tuple[float, float]],
) -> dict[str, Any]:
    """Return the numbers of a run, without its warm-up."""
    ticks = robot.ticks[first_tick:]
    if len(ticks) < 2 or len(memory) < 2:
        raise RuntimeError(f'soak: expected ticks after {WARM_UP_S:g} s of warm-up, got too few')
    times_s, megabytes = np.array(memory).T
    spec, _ = bundle.sampler(args.sampler)

    def percentiles(name: str) -> dict[str, float]:
        values = np.array([tick[name] for tick in ticks]) * 1e3
        return {f'p{p}': round(float(np.percentile(values, p)), 2) for p in (50, 95, 99, 100)}

    return {
        'machine': describe_machine('cpu'),
        'warm_up_s': WARM_UP_S,
        'command': ' '.join(['python', *sys.argv]),
        'minutes': round((times_s[-1] - times_s[0]) / 60, 2),
        'ticks': len(ticks),
        'skipped_ticks': sum(tick['skipped_ticks'] for tick in ticks),
        'skips': skips(ticks, robot.late_frames),
        'deadline_misses': sum(tick['deadline_miss'] for tick in ticks),
        'refused': sum(tick['refused'] is not None for tick in ticks),
        'resets': sum(tick['reset'] is not None for tick in ticks),
        'latency_ms': percentiles('latency_s'),
        'publishing_age_ms': percentiles('observation_age_s'),
        'oldest_rollout_ticks': max(tick['oldest_rollout_ticks'] for tick in ticks),
        'max_rollout_age': spec.max_rollout_age,
        'memory_mb': {'first': round(megabytes[0], 1), 'last': round(megabytes[-1], 1)},
        'growth_mb_a_minute': round(float(np.polyfit(times_s / 60, megabytes, 1)[0]), 3),
    }


def skips(
    ticks: list[dict[str, Any]], late_frames: list[tuple[int, float]]
) -> list[dict[str, float]]:
    """Return size, preceding tick and lateness of the robot for every gap between ticks."""
    found = []
    for before, tick in itertools.pairwise(ticks):
        if tick['skipped_ticks']:
            late_s = [
                late_s
                for stamp_ns, late_s in late_frames
                if before['stamp_ns'] < stamp_ns <= tick['stamp_ns']
            ]
            found.append(
                {
                    'minute': round((tick['stamp_ns'] - ticks[0]['stamp_ns']) / 6e10, 2),
                    'skipped': tick['skipped_ticks'],
                    'latency_before_ms': round(before['latency_s'] * 1e3, 1),
                    'age_before_ms': round(before['observation_age_s'] * 1e3, 1),
                    'robot_late_ms': round(max(late_s, default=0.0) * 1e3, 1),
                }
            )
    return found


def main() -> int:
    """Run node and robot, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('bundle', type=Path)
    parser.add_argument(
        '--minutes', type=float, default=30.0, help='after half a minute of warm-up'
    )
    parser.add_argument('--sampler', default='ddim10')
    parser.add_argument('--sparsity', type=float, default=0.8)
    parser.add_argument('--n-execute', type=int, default=1, help='periods between two ticks')
    parser.add_argument(
        '--realtime-priority', type=int, default=0, help='1 to 99: node and robot under SCHED_FIFO'
    )
    parser.add_argument('--out', type=Path, help='JSON of the table')
    args = parser.parse_args()
    try:
        bundle = load_bundle(args.bundle)
        bundle.sampler(args.sampler)
    except ValueError as error:
        print(f'soak: {error}', file=sys.stderr)
        return 2
    # Ctrl-C ends the run early, with its numbers; rclpy's own handler would end the robot first.
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    try:
        if args.realtime_priority:
            priority = os.sched_param(args.realtime_priority)
            os.sched_setscheduler(0, os.SCHED_FIFO, priority)
        gc.collect()
        gc.freeze()
        result = run(args, bundle)
    except (RuntimeError, OSError) as error:
        print(f'soak: {error}', file=sys.stderr)
        return 1
    finally:
        rclpy.try_shutdown()
    for name, value in result.items():
        print(f'{name:22} {value}')
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + '\n', encoding='utf-8')
    kept = (
        result['skipped_ticks'] == 0
        and result['growth_mb_a_minute'] <= GROWTH_MB_A_MINUTE
        and result['oldest_rollout_ticks'] <= result['max_rollout_age']
    )
    return 0 if kept else 1


if __name__ == '__main__':
    sys.exit(main())
