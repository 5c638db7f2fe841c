# SPDX-License-Identifier: Apache-2.0
"""`record_bag`: record topics as a rosbag2 file (mcap); for machines without `ros2 bag record`.

Ends by SIGINT, SIGTERM or --duration; the file has its index then.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import threading
import time
from pathlib import Path

import rclpy
from rclpy.signals import SignalHandlerOptions
from tqdm import tqdm

from tts_policy.data.reader import BagError
from tts_policy.node.recorder import BagRecorder, RecorderSpec


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Command line of `record_bag`, without ROS arguments."""
    parser = argparse.ArgumentParser(prog='record_bag', description=__doc__.split('\n')[0])
    parser.add_argument('out', type=Path, help='folder to be made')
    parser.add_argument('--topics', nargs='+', help='record these only (default: all)')
    parser.add_argument('--exclude', nargs='+', default=[], metavar='TOPIC')
    parser.add_argument('--duration', type=float, default=math.inf, metavar='S')
    parser.add_argument(
        '--queue', type=int, default=100, help='messages of a topic that may wait for the disk'
    )
    parser.add_argument('--compress', action='store_true', help='chunks in zstd')
    args = parser.parse_args(arguments)
    if not args.duration > 0 or not 1 <= args.queue <= 100_000:
        parser.error(
            f'arguments: expected a positive duration and a queue of 1 to 100000, '
            f'got {args.duration} and {args.queue}'
        )
    return args


def _record(args: argparse.Namespace, stopped: threading.Event) -> int:
    topics = None if args.topics is None else tuple(args.topics)
    recorder = BagRecorder(
        args.out, RecorderSpec(topics, tuple(args.exclude), args.queue, args.compress)
    )
    end_s = time.monotonic() + args.duration
    try:
        with tqdm(unit=' messages', mininterval=1) as bar:

            def progress() -> None:
                bar.set_postfix_str(f'{recorder.bytes / 2**20:.1f} MiB', refresh=False)
                bar.update(recorder.messages - bar.n)

            recorder.record(lambda: stopped.is_set() or time.monotonic() >= end_s, progress)
            progress()
    finally:
        recorder.close()
    shortcomings = recorder.shortcomings()
    for line in shortcomings:
        print(f'record_bag: {line}', file=sys.stderr)
    print(f'{args.out}: {recorder.messages} messages, {recorder.bytes / 2**20:.1f} MiB')
    return 1 if shortcomings else 0


def main(arguments: list[str] | None = None) -> int:
    """Record; 0 when all went well, 1 for lost or missing messages, 2 if it cannot be written."""
    given = sys.argv[1:] if arguments is None else arguments
    own = given.index('--ros-args') if '--ros-args' in given else len(given)
    args = parse_arguments(given[:own])
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    rclpy.init(args=given[own:], signal_handler_options=SignalHandlerOptions.NO)
    try:
        return _record(args, stopped)
    except (BagError, OSError) as error:
        print(f'record_bag: {error}', file=sys.stderr)
        return 2
    finally:
        rclpy.shutdown()


if __name__ == '__main__':
    sys.exit(main())
