# SPDX-License-Identifier: Apache-2.0
"""A node as a process: spun until SIGINT, SIGTERM or its own end, and shut down in order.

rclpy's own signal handlers close the context at once; nothing could be sent any more then, not
even the hold position. Here the node's lifecycle shutdown comes first. A node that is busy can ask
whether it is to end (`FinalizableNode.stopping`).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Protocol

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.signals import SignalHandlerOptions

if TYPE_CHECKING:
    from collections.abc import Callable

# Python runs signal handlers between two waits of the executor.
_WAIT_S = 0.1


class FinalizableNode(Protocol):
    """A lifecycle node that knows whether it was shut down, and is told whether it is to be."""

    finalized: bool
    stopping: Callable[[], bool]

    def trigger_shutdown(self) -> object:
        """Do the shutdown transition."""

    def destroy_node(self) -> None:
        """Free the node."""


def run_node(
    create: Callable[[], FinalizableNode], name: str, arguments: list[str] | None = None
) -> int:
    """Create a node and spin it to its end; 1 with one logged line if something goes wrong.

    `create` raises `ValueError` for bad parameters. An exception in a callback ends the node in
    order: it cannot be relied on any more, but it still holds the arm.
    """
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    rclpy.init(args=arguments, signal_handler_options=SignalHandlerOptions.NO)
    try:
        node = create()
    except ValueError as error:
        rclpy.logging.get_logger(name).fatal(str(error))
        rclpy.shutdown()
        return 1
    node.stopping = stop.is_set
    status = 0
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        while not stop.is_set() and not node.finalized:
            try:
                executor.spin_once(timeout_sec=_WAIT_S)
            except rclpy_implementation.RCLError as error:
                # rclpy raises a transition that is not possible now out of its service.
                rclpy.logging.get_logger(name).error(f'request refused: {error}')
    except Exception as error:  # noqa: BLE001 - the arm is held whatever it was
        where = traceback.extract_tb(error.__traceback__)[-1]
        rclpy.logging.get_logger(name).fatal(
            f'{type(error).__name__}: {error} ({where.name}, line {where.lineno})'
        )
        status = 1
    finally:
        if not node.finalized:
            node.trigger_shutdown()
        executor.shutdown()
        node.destroy_node()
        rclpy.shutdown()
    if any(thread.daemon for thread in threading.enumerate()):
        # The end of the interpreter would tear down what a thread left behind still runs in.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
