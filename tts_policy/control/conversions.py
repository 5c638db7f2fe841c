# SPDX-License-Identifier: Apache-2.0
"""Joint states and stamps as numbers, with every assumption about a message checked.

A message that does not match the contract is refused with one line that names the topic, what was
expected and what came. It is never repaired, cropped or filled with zeros. Time is carried as int
nanoseconds of the ROS clock. Messages are described by protocols, so those of rclpy and of rosbags
serve alike and ROS is not imported.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

NS_PER_S = 1_000_000_000
# No joint is further out, in rad or m; what does not fit float32 is above it by far.
LARGEST_POSITION = 1e6
# Names that an error quotes.
_SHOWN = 12


class Stamp(Protocol):
    """builtin_interfaces/Time or Duration."""

    sec: int
    nanosec: int


class JointStateMessage(Protocol):
    """What is read of a sensor_msgs/JointState."""

    name: Sequence[str]
    position: Sequence[float]


class ConversionError(ValueError):
    """A message that does not fit the contract; one line: topic, expected, got."""


def seconds_to_ns(seconds: float) -> int:
    """Nearest whole nanosecond of a duration in seconds."""
    return round(seconds * NS_PER_S)


def time_to_ns(stamp: Stamp) -> int:
    """Nanoseconds of a time, of the clock it was taken from, or of a duration."""
    return int(stamp.sec) * NS_PER_S + int(stamp.nanosec)


def holds_positions_of_any(msg: JointStateMessage, names: Sequence[str]) -> bool:
    """Whether a joint state is about any of these joints, or only of other devices.

    A gripper may publish its joints on the same topic, and some drivers send velocities alone:
    such messages are not ours, and no fault either.
    """
    return len(msg.position) > 0 and not set(names).isdisjoint(msg.name)


def joint_positions(
    msg: JointStateMessage, names: Sequence[str], topic: str, largest: float = LARGEST_POSITION
) -> np.ndarray:
    """Positions of the named joints, in the order of `names`, whatever order they came in.

    Parameters
    ----------
    msg
        may hold more joints than needed.
    names
        joints of the contract.
    topic
        named in the error.

    Returns
    -------
    numpy.ndarray
        float64 [len(names)] in the message's units (rad, m).

    Raises
    ------
    ConversionError
        for a missing or repeated joint, positions that do not pair with names, NaN, infinity, or
        more than `largest` in size.

    """
    if len(msg.name) != len(msg.position):
        raise ConversionError(
            f'{topic}: expected one position per name, '
            f'got {len(msg.name)} names and {len(msg.position)} positions'
        )
    index = {name: i for i, name in enumerate(msg.name)}
    missing = [name for name in names if name not in index]
    if missing:
        raise ConversionError(
            f'{topic}: expected joints {list(names)}, missing {missing}, got {_shown(msg.name)}'
        )
    if len(index) != len(msg.name):
        repeated = sorted(name for name, count in Counter(msg.name).items() if count > 1)
        raise ConversionError(
            f'{topic}: expected each joint once, got {_shown(repeated)} repeatedly'
        )
    values = np.array([msg.position[index[name]] for name in names], dtype=np.float64)
    plausible = np.abs(values) <= largest
    if not plausible.all():
        bad = {n: float(v) for n, v in zip(names, values, strict=True) if not abs(v) <= largest}
        raise ConversionError(
            f'{topic}: expected finite positions of at most {largest:g}, got {bad}'
        )
    return values


def _shown(names: Sequence[str]) -> str:
    """Names as a list of bounded length: anybody may publish thousands of them."""
    shown = [name[:40] for name in names[:_SHOWN]]
    return f'{shown}' if len(names) <= _SHOWN else f'{shown} and {len(names) - _SHOWN} more'
