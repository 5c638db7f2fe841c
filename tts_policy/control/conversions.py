# SPDX-License-Identifier: Apache-2.0
"""Messages to arrays and back, with every assumption about a message checked.

A message that does not match the contract is refused with one line that names the topic, what was
expected and what came; it is never repaired, cropped or filled with zeros. Time is carried as int
nanoseconds of the ROS clock. What reads messages works on those of rclpy and of rosbags alike, and
imports no ROS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from builtin_interfaces.msg import Duration, Time
    from sensor_msgs.msg import Image, JointState

NS_PER_S = 1_000_000_000

# Channels of each accepted encoding, and which of them are red, green and blue.
_ENCODINGS: dict[str, tuple[int, tuple[int, int, int]]] = {
    'rgb8': (3, (0, 1, 2)),
    'bgr8': (3, (2, 1, 0)),
    'rgba8': (4, (0, 1, 2)),
    'bgra8': (4, (2, 1, 0)),
    'mono8': (1, (0, 0, 0)),
}


class ConversionError(ValueError):
    """A message that does not fit the contract; one line: topic, expected, got."""


def seconds_to_ns(seconds: float) -> int:
    """Nearest whole nanosecond of a duration in seconds."""
    return round(seconds * NS_PER_S)


def time_to_ns(stamp: Time) -> int:
    """Nanoseconds of a builtin_interfaces Time (of the clock it was taken from)."""
    return int(stamp.sec) * NS_PER_S + int(stamp.nanosec)


def ns_to_time(stamp_ns: int) -> Time:
    """builtin_interfaces Time of a stamp in nanoseconds."""
    from builtin_interfaces.msg import Time

    sec, nanosec = divmod(int(stamp_ns), NS_PER_S)
    return Time(sec=sec, nanosec=nanosec)


def ns_to_duration(duration_ns: int) -> Duration:
    """builtin_interfaces Duration of nanoseconds."""
    from builtin_interfaces.msg import Duration

    sec, nanosec = divmod(int(duration_ns), NS_PER_S)
    return Duration(sec=sec, nanosec=nanosec)


def image_to_rgb(msg: Image, height: int, width: int, topic: str) -> np.ndarray:
    """Pixels of an 8-bit image as RGB.

    Parameters
    ----------
    msg
        rgb8, bgr8, rgba8, bgra8 or mono8; rows may be padded (step larger than the row).
    height, width
        the only size accepted, in pixels.
    topic
        named in the error.

    Returns
    -------
    numpy.ndarray
        uint8 [height, width, 3]; it may share memory with the message.

    Raises
    ------
    ConversionError
        for another encoding or size, or fewer bytes than the header promises.

    """
    if msg.encoding not in _ENCODINGS:
        raise ConversionError(
            f'{topic}: expected encoding {", ".join(_ENCODINGS)}, got {msg.encoding!r}'
        )
    channels, order = _ENCODINGS[msg.encoding]
    if (msg.height, msg.width) != (height, width):
        raise ConversionError(
            f'{topic}: expected an image of {height} x {width} (height x width), '
            f'got {msg.height} x {msg.width}'
        )
    row_bytes = width * channels
    if msg.step < row_bytes:
        raise ConversionError(
            f'{topic}: expected step of at least {row_bytes} bytes for {width} {msg.encoding} '
            f'pixels, got {msg.step}'
        )
    expected_bytes = height * msg.step
    data = np.frombuffer(msg.data, dtype=np.uint8)
    if data.size < expected_bytes:
        raise ConversionError(
            f'{topic}: expected {expected_bytes} bytes (height {height} x step {msg.step}), '
            f'got {data.size}'
        )
    rows = data[:expected_bytes].reshape(height, msg.step)[:, :row_bytes]
    pixels = rows.reshape(height, width, channels)
    if msg.encoding == 'rgb8':
        return np.ascontiguousarray(pixels)
    return np.ascontiguousarray(pixels[..., list(order)])


def joint_positions(msg: JointState, names: Sequence[str], topic: str) -> np.ndarray:
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
        for a missing or repeated joint, positions that do not pair with names, NaN or infinity.

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
            f'{topic}: expected joints {list(names)}, missing {missing}, got {list(msg.name)}'
        )
    if len(index) != len(msg.name):
        repeated = sorted({name for name in msg.name if list(msg.name).count(name) > 1})
        raise ConversionError(f'{topic}: expected each joint once, got {repeated} repeatedly')
    values = np.array([msg.position[index[name]] for name in names], dtype=np.float64)
    if not np.isfinite(values).all():
        bad = {n: float(v) for n, v in zip(names, values, strict=True) if not np.isfinite(v)}
        raise ConversionError(f'{topic}: expected finite positions, got {bad}')
    return values
