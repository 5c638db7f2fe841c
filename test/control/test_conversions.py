# SPDX-License-Identifier: Apache-2.0
"""Image and joint-state messages are taken apart exactly, or refused with the reason."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')

from sensor_msgs.msg import Image, JointState

from tts_policy.control.conversions import (
    ConversionError,
    image_to_rgb,
    joint_positions,
    ns_to_duration,
    ns_to_time,
    seconds_to_ns,
    time_to_ns,
)

HEIGHT, WIDTH = 3, 4
RGB = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def image(pixels: np.ndarray, encoding: str, padding: int = 0) -> Image:
    """Return the message of [H, W, C] pixels with padded rows."""
    rows = pixels.reshape(pixels.shape[0], -1)
    rows = np.pad(rows, ((0, 0), (0, padding)), constant_values=77)
    return Image(
        height=pixels.shape[0],
        width=pixels.shape[1],
        encoding=encoding,
        step=rows.shape[1],
        data=rows.tobytes(),
    )


@pytest.mark.parametrize('padding', [0, 5])
@pytest.mark.parametrize(
    ('encoding', 'channels'),
    [('rgb8', (0, 1, 2)), ('bgr8', (2, 1, 0)), ('rgba8', (0, 1, 2, 0)), ('bgra8', (2, 1, 0, 0))],
)
def test_colour_encodings_give_rgb_with_and_without_row_padding(
    encoding: str, channels: tuple[int, ...], padding: int
) -> None:
    msg = image(RGB[..., list(channels)], encoding, padding)
    assert np.array_equal(image_to_rgb(msg, HEIGHT, WIDTH, 'camera/image'), RGB)


def test_mono8_is_repeated_in_every_channel() -> None:
    got = image_to_rgb(image(RGB[..., :1], 'mono8', 3), HEIGHT, WIDTH, 'camera/image')
    assert got.dtype == np.uint8
    assert np.array_equal(got, RGB[..., [0, 0, 0]])


@pytest.mark.parametrize('encoding', ['16UC1', 'mono16', 'rgb16', 'bayer_rggb8', 'yuv422', ''])
def test_other_encodings_are_refused_by_name(encoding: str) -> None:
    with pytest.raises(ConversionError, match=f"camera/image.*rgb8.*got '{encoding}'"):
        image_to_rgb(image(RGB, encoding), HEIGHT, WIDTH, 'camera/image')


def test_another_size_is_refused() -> None:
    with pytest.raises(ConversionError, match=r'expected an image of 6 x 4 .* got 3 x 4'):
        image_to_rgb(image(RGB, 'rgb8'), 6, 4, 'camera/image')


def test_fewer_bytes_than_height_times_step_are_refused() -> None:
    msg = image(RGB, 'rgb8')
    msg.data = msg.data[:-1]
    with pytest.raises(ConversionError, match=r'expected 36 bytes .* got 35'):
        image_to_rgb(msg, HEIGHT, WIDTH, 'camera/image')


def test_a_step_shorter_than_a_row_is_refused() -> None:
    msg = image(RGB, 'rgb8')
    msg.step = 11
    with pytest.raises(ConversionError, match='step of at least 12 bytes'):
        image_to_rgb(msg, HEIGHT, WIDTH, 'camera/image')


def test_joints_are_taken_by_name_whatever_their_order() -> None:
    msg = JointState(name=['c', 'extra', 'a', 'b'], position=[3.0, 9.0, 1.0, 2.0])
    assert joint_positions(msg, ('a', 'b', 'c'), 'joint_states').tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ('names', 'positions', 'reason'),
    [
        (['a', 'c'], [1.0, 2.0], r"missing \['b'\]"),
        (['a', 'b'], [1.0], '2 names and 1 positions'),
        (['a', 'b', 'b'], [1.0, 2.0, 3.0], r"each joint once, got \['b'\]"),
        (['a', 'b'], [1.0, float('nan')], "finite positions, got {'b': nan}"),
        (['a', 'b'], [float('-inf'), 1.0], "finite positions, got {'a': -inf}"),
        ([], [], 'missing'),
    ],
)
def test_joint_states_that_do_not_fit_are_refused(
    names: list[str], positions: list[float], reason: str
) -> None:
    with pytest.raises(ConversionError, match=f'joint_states: .*{reason}'):
        joint_positions(JointState(name=names, position=positions), ('a', 'b'), 'joint_states')


@pytest.mark.parametrize('stamp_ns', [0, 1, 999_999_999, 1_000_000_000, 1_700_000_000_123_456_789])
def test_time_survives_the_round_trip_to_the_nanosecond(stamp_ns: int) -> None:
    assert time_to_ns(ns_to_time(stamp_ns)) == stamp_ns
    assert time_to_ns(ns_to_duration(stamp_ns)) == stamp_ns


def test_seconds_are_rounded_to_whole_nanoseconds() -> None:
    assert seconds_to_ns(0.05) == 50_000_000
    assert seconds_to_ns(0.1 + 0.2) == 300_000_000
