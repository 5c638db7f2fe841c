# SPDX-License-Identifier: Apache-2.0
"""What goes wrong with the messages of a sensor: functions from a message to what is published.

None is nothing at all, a list is published one by one.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from feeder import HEIGHT

if TYPE_CHECKING:
    from collections.abc import Callable

    from sensor_msgs.msg import Image, JointState


def set_field(**fields: Any) -> Callable[[Any], Any]:
    """Return a spoiler that sets fields of a message."""

    def spoil(message: Any) -> Any:
        for name, value in fields.items():
            setattr(message, name, value)
        return message

    return spoil


def shift_stamp(seconds: int) -> Callable[[Any], Any]:
    """Return a spoiler of the clock of a sensor."""

    def spoil(message: Any) -> Any:
        message.header.stamp.sec += seconds
        return message

    return spoil


def delay(messages: int) -> Callable[[Any], Any]:
    """Return a spoiler that holds messages back for so many more."""
    queue: deque[Any] = deque()

    def spoil(message: Any) -> Any:
        queue.append(message)
        return queue.popleft() if len(queue) > messages else None

    return spoil


def freeze() -> Callable[[Any], Any]:
    """Return a spoiler that repeats the first message for ever."""
    first: list[Any] = []

    def spoil(message: Any) -> Any:
        first.append(message)
        return first[0]

    return spoil


def swap() -> Callable[[Any], Any]:
    """Return a spoiler that publishes two messages at a time, the newer one first."""
    held: list[Any] = []

    def spoil(message: Any) -> Any:
        held.append(message)
        if len(held) < 2:
            return None
        newer_first = held[::-1]
        held.clear()
        return newer_first

    return spoil


def every(count: int) -> Callable[[Any], Any]:
    """Return a spoiler that lets one of so many messages through."""
    seen = 0

    def spoil(message: Any) -> Any:
        nonlocal seen
        seen += 1
        return message if seen % count == 0 else None

    return spoil


def shrink(message: Image) -> Image:
    message.height, message.data = HEIGHT // 2, message.data[: HEIGHT // 2 * message.step]
    return message


def cut(message: Image) -> Image:
    message.data = message.data[:-1]
    return message


def without_elbow(message: JointState) -> JointState:
    message.name, message.position = ['finger', 'shoulder'], [0.1, 0.3]
    return message
