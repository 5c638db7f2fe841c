# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of reading a recording and building its windows, without any policy.

    python bench/bag_reading.py --seconds 60 --image raw jpeg --json out/bag_reading.json

Writes a recording of one 640 x 480 camera at 30 Hz and joint states at 100 Hz, then reads it in a
process of its own, twice: the first pass warms up the disk cache.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore
from tqdm import tqdm

from tts_policy.data.reader import BagReader
from tts_policy.data.replay import RecordedTicks
from tts_policy.data.samples import SampleReader, Topics
from tts_policy.policy.contract import ActionSpec, CameraSpec, ObservationSpec, PolicyContract

HEIGHT, WIDTH, FRAME_HZ, STATE_HZ = 480, 640, 30, 100
JOINTS = tuple(f'joint{j}' for j in range(8))
CONTRACT = PolicyContract(
    ObservationSpec((CameraSpec('camera', HEIGHT, WIDTH),), JOINTS, steps=2, period_s=0.05),
    ActionSpec(JOINTS, horizon=16, execute=8, offset_steps=1),
)
TICK_NS = 8 * 50_000_000


def _messages(image: str, seconds: float) -> Iterator[tuple[str, int, Any]]:
    types = get_typestore(Stores.ROS2_JAZZY).types
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    scene = np.stack([x // 3, y // 2, (x + y) // 5], -1).astype(np.uint8)
    scenes = [scene + rng.integers(0, 12, scene.shape, np.uint8) for _ in range(8)]
    encoded = [cv2.imencode('.jpg', s, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].ravel() for s in scenes]
    frames = 0
    for state in count():
        stamp = 1_000_000_000 + state * 1_000_000_000 // STATE_HZ
        if state >= seconds * STATE_HZ:
            return
        header = types['std_msgs/msg/Header'](
            types['builtin_interfaces/msg/Time'](*divmod(stamp, 1_000_000_000)), ''
        )
        yield (
            '/joint_states',
            stamp,
            types['sensor_msgs/msg/JointState'](
                header,
                list(JOINTS),
                np.sin(state * 0.01 + np.arange(8.0)),
                np.zeros(8),
                np.zeros(8),
            ),
        )
        if frames * STATE_HZ <= state * FRAME_HZ:
            at = frames % len(scenes)
            frames += 1
            if image == 'raw':
                message = types['sensor_msgs/msg/Image'](
                    header, HEIGHT, WIDTH, 'rgb8', 0, 3 * WIDTH, scenes[at].ravel()
                )
            else:
                message = types['sensor_msgs/msg/CompressedImage'](header, 'jpeg', encoded[at])
            yield '/camera/image', stamp, message


def write(path: Path, image: str, seconds: float) -> int:
    """Write a recording; returns its size in bytes."""
    store = get_typestore(Stores.ROS2_JAZZY)
    connections: dict[str, Any] = {}
    total = round(seconds * (STATE_HZ + FRAME_HZ))
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        for topic, stamp, message in tqdm(_messages(image, seconds), f'writing {image}', total):
            if topic not in connections:
                connections[topic] = writer.add_connection(
                    topic, message.__msgtype__, typestore=store
                )
            writer.write(
                connections[topic], stamp, store.serialize_cdr(message, message.__msgtype__)
            )
    return sum(file.stat().st_size for file in path.iterdir())


def read(path: Path, decoder: str) -> dict[str, Any]:
    """Read and build every window; in a process of its own, so that its peak memory counts."""
    base_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    samples = SampleReader(BagReader(path), CONTRACT, Topics.of(CONTRACT), decoder)
    ticks = sum(1 for _ in RecordedTicks(samples, TICK_NS))
    return {
        'ticks': ticks,
        'seconds': time.perf_counter() - began_s,
        'cpu_s': time.process_time() - began_cpu_s,
        'peak_mib': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        'before_mib': base_mib,
    }


def _processor() -> str:
    names = [
        line.partition(':')[2].strip()
        for line in Path('/proc/cpuinfo').read_text().splitlines()
        if line.startswith('model name')
    ]
    return f'{names[0]}, {len(names)} cores' if names else platform.machine()


def main(arguments: list[str] | None = None) -> int:
    """Print a table and write the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--seconds', type=float, default=60.0, help='of each recording')
    parser.add_argument('--image', nargs='+', choices=('raw', 'jpeg'), default=['raw', 'jpeg'])
    parser.add_argument('--decoder', nargs='+', default=['rclpy', 'rosbags'])
    parser.add_argument('--folder', type=Path, help='for the recordings; default: temporary')
    parser.add_argument('--json', type=Path)
    args = parser.parse_args(arguments)
    print(f'{_processor()}, Python {platform.python_version()}, one process, no torch')
    rows = []
    context = multiprocessing.get_context('spawn')
    with TemporaryDirectory(dir=args.folder) as folder:
        for image in args.image:
            path = Path(folder) / image
            size = write(path, image, args.seconds)
            for decoder in args.decoder:
                for warm in (False, True):
                    with context.Pool(1) as pool:
                        row = pool.apply(read, (path, decoder))
                    if not warm:
                        continue
                    row |= {'image': image, 'decoder': decoder, 'gib': size / 2**30}
                    row['real_time'] = args.seconds / row['seconds']
                    rows.append(row)
                    print(
                        f'{image:5} {decoder:8} {row["gib"]:6.2f} GiB {row["seconds"]:7.2f} s '
                        f'{row["real_time"]:6.1f} x real time ({row["cpu_s"]:.2f} s of CPU), '
                        f'peak {row["peak_mib"]:.0f} MiB '
                        f'({row["before_mib"]:.0f} before), {row["ticks"]} ticks'
                    )
            shutil.rmtree(path)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps(
                {'processor': _processor(), 'seconds': args.seconds, 'rows': rows}, indent=2
            )
            + '\n'
        )
    return 0


if __name__ == '__main__':
    sys.exit(main())
