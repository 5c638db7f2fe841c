# SPDX-License-Identifier: Apache-2.0
"""`play_bag`: publish a recording on topics, with /clock; for machines without `ros2 bag play`.

With --lockstep NODE it waits for the chunks of that policy node, which then makes exactly the
ticks of evaluate_bag. ~/pause and ~/resume stop and go on.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import rclpy
from rclpy.signals import SignalHandlerOptions

from tts_policy.data.bag_samples import add_topic_argument, parse_pairs
from tts_policy.data.reader import BagError, BagReader
from tts_policy.node.lockstep import LockstepError, LockstepPlayback
from tts_policy.node.player import BagPlayer, PacedPlayback, PlayerSpec, Stopped

INTERRUPTED = 130


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Command line of `play_bag`, without ROS arguments."""
    parser = argparse.ArgumentParser(prog='play_bag', description=__doc__.split('\n')[0])
    parser.add_argument('bag', type=Path, help='folder with metadata.yaml, .mcap or .db3')
    parser.add_argument('--rate', type=float, default=1.0, help='1 is as recorded')
    parser.add_argument('--loop', action='store_true')
    parser.add_argument('--start-offset', type=float, default=0.0, metavar='S')
    parser.add_argument('--topics', nargs='+', help='play these only')
    parser.add_argument('--remap', nargs='+', default=[], metavar='FROM:=TO')
    parser.add_argument('--clock', type=float, default=100.0, metavar='HZ', help='0: no /clock')
    parser.add_argument('--start-paused', action='store_true')
    parser.add_argument('--lockstep', metavar='NODE', help='policy node to wait for: /tts_policy')
    parser.add_argument('--after', metavar='NODE', help='begin when this lifecycle node is active')
    add_topic_argument(parser)
    parser.add_argument('--timeout', type=float, default=60.0, metavar='S', help='of the node')
    args = parser.parse_args(arguments)
    for name, low in (('rate', 1e-3), ('start_offset', 0.0), ('clock', 0.0), ('timeout', 0.1)):
        value = getattr(args, name)
        if not math.isfinite(value) or value < low:
            parser.error(f'--{name.replace("_", "-")}: expected at least {low:g}, got {value}')
    return args


def _play(args: argparse.Namespace, stopped: threading.Event) -> int:
    spec = PlayerSpec(
        None if args.topics is None else tuple(args.topics),
        parse_pairs(args.remap, '--remap', 'FROM:=TO'),
        args.rate,
        args.loop,
        args.start_offset,
        args.clock,
        args.start_paused,
        args.lockstep,
    )
    player = BagPlayer(BagReader(args.bag), spec)
    status = 0
    try:
        try:
            playback = _begin(player, args, stopped.is_set)
            playback.play()
            while args.loop:
                playback.play()
        except Stopped:
            status = INTERRUPTED
        player.deliver()
        player.get_logger().info(f'{player.published} messages published')
    finally:
        player.close()
    return status


def _begin(
    player: BagPlayer, args: argparse.Namespace, stopped: Callable[[], bool]
) -> PacedPlayback | LockstepPlayback:
    """Wait until the policy node or, without one, any listener is there."""
    if args.after is not None:
        player.await_active(args.after, args.timeout, stopped)
    if args.lockstep is not None:
        topics = parse_pairs(args.topic, '--topic', 'STREAM:=TOPIC')
        return LockstepPlayback(player, args.lockstep, topics, args.timeout, stopped)
    player.await_listeners(stopped)
    return PacedPlayback(player, stopped)


def main(arguments: list[str] | None = None) -> int:
    """Play; 0 at the end, 130 when interrupted, 1 for a damaged bag or a silent node."""
    given = sys.argv[1:] if arguments is None else arguments
    # rcl would take our own FROM:=TO arguments for remapping rules of this node.
    own = given.index('--ros-args') if '--ros-args' in given else len(given)
    args = parse_arguments(given[:own])
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    rclpy.init(args=given[own:], signal_handler_options=SignalHandlerOptions.NO)
    try:
        return _play(args, stopped)
    except (BagError, LockstepError, OSError, ValueError) as error:
        print(f'play_bag: {error}', file=sys.stderr)
        return 1
    finally:
        rclpy.shutdown()


if __name__ == '__main__':
    sys.exit(main())
