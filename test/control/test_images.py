# SPDX-License-Identifier: Apache-2.0
"""Compressed images, images of another size, and what never reaches the decoder."""

from __future__ import annotations

import struct
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip('cv2', reason='opencv is not installed')

import cv2

from tts_policy.control import images
from tts_policy.control.conversions import ConversionError
from tts_policy.control.images import (
    ImageFit,
    compressed_to_rgb,
    encoded_size,
    fit_image,
    raw_to_rgb,
)

PIXELS = np.zeros((24, 32, 3), np.uint8)
PIXELS[:, 16:] = (200, 30, 10)


def compressed(pixels: np.ndarray, kind: str) -> SimpleNamespace:
    """Encode RGB (or gray) pixels."""
    blue_first = pixels[..., ::-1] if pixels.ndim == 3 else pixels
    ok, data = cv2.imencode(f'.{kind}', blue_first)
    assert ok
    return SimpleNamespace(format=kind, data=data.tobytes())


def test_png_is_exact_and_jpeg_is_close() -> None:
    assert np.array_equal(compressed_to_rgb(compressed(PIXELS, 'png'), 24, 32, 't'), PIXELS)
    got = compressed_to_rgb(compressed(PIXELS, 'jpg'), 24, 32, 't')
    assert np.abs(got.astype(int) - PIXELS)[:, [2, 28]].max() < 12


@pytest.mark.parametrize(
    ('form', 'red_first'),
    [
        ('rgb8; jpeg compressed bgr8', False),
        ('bgr8; jpeg compressed bgr8', False),
        ('rgb8; jpeg compressed rgb8', True),
        ('rgb8; png compressed rgb8', True),
        ('bayer_rggb8; jpeg compressed rgb8', False),
        ('jpeg', False),
        ('', False),
    ],
)
def test_the_order_of_colours_is_what_image_transport_says_it_is(
    form: str, red_first: bool
) -> None:
    message = compressed(PIXELS[..., ::-1] if red_first else PIXELS, 'png')
    message.format = form
    assert np.array_equal(compressed_to_rgb(message, 24, 32, 't'), PIXELS)


def test_gray_becomes_rgb() -> None:
    gray = PIXELS[..., 0]
    got = compressed_to_rgb(compressed(gray, 'png'), 24, 32, 't')
    assert np.array_equal(got, np.repeat(gray[..., None], 3, axis=2))


@pytest.mark.parametrize('kind', ['png', 'jpg'])
def test_the_size_is_read_from_the_header(kind: str) -> None:
    assert encoded_size(bytes(compressed(PIXELS, kind).data)) == (24, 32)


@given(st.binary(max_size=64), st.sampled_from([b'', b'\xff\xd8', b'\x89PNG\r\n\x1a\n']))
def test_any_bytes_have_a_size_or_none(data: bytes, start: bytes) -> None:
    size = encoded_size(start + data)
    assert size is None or min(size) >= 0


@pytest.mark.fault
def test_a_header_that_promises_too_much_never_reaches_the_decoder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = bytearray(compressed(PIXELS, 'png').data)
    data[16:24] = struct.pack('>II', 60_000, 60_000)
    message = SimpleNamespace(format='png', data=bytes(data))
    monkeypatch.setattr(images.cv2, 'imdecode', lambda *_: pytest.fail('decoded'))
    for fit in ImageFit:
        with pytest.raises(ConversionError, match='got 60000 x 60000'):
            compressed_to_rgb(message, 24, 32, 't', fit)


@pytest.mark.fault
@pytest.mark.parametrize(
    ('message', 'reason'),
    [
        (SimpleNamespace(format='png', data=b'GIF89a' + bytes(99)), 'expected a jpeg or png'),
        (SimpleNamespace(format='jpeg', data=b''), 'expected a jpeg or png, got 0 bytes'),
        (compressed(PIXELS.astype(np.uint16) * 256, 'png'), 'expected 8 bits a channel'),
        (compressed(PIXELS[:12], 'png'), 'expected an image of 24 x 32'),
    ],
    ids=['gif', 'empty', '16 bit', 'other size'],
)
def test_other_formats_depths_and_sizes_are_refused(message: SimpleNamespace, reason: str) -> None:
    with pytest.raises(ConversionError, match='t: ') as caught:
        compressed_to_rgb(message, 24, 32, 't')
    assert reason in str(caught.value)


@pytest.mark.fault
@pytest.mark.parametrize('filling', [b'\xff', b'\xff\xe0\x00\x02'], ids=['fill', 'segments'])
def test_a_jpeg_of_nothing_but_markers_is_given_up_soon(filling: bytes) -> None:
    """The callback that reads it is of the thread that watches over the arm."""
    data = b'\xff\xd8' + filling * (8_000_000 // len(filling))
    began_s = time.perf_counter()
    assert encoded_size(data) is None
    assert time.perf_counter() - began_s < 0.1


@pytest.mark.fault
def test_an_image_at_which_the_decoder_raises_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def imdecode(*_: object) -> None:
        raise cv2.error('out of memory')

    monkeypatch.setattr(images.cv2, 'imdecode', imdecode)
    with pytest.raises(ConversionError, match='can be decoded, got damage'):
        compressed_to_rgb(compressed(PIXELS, 'png'), 24, 32, 't')


@pytest.mark.fault
def test_a_damaged_image_is_refused() -> None:
    message = compressed(PIXELS, 'png')
    message.data = bytes(message.data)[:40]
    with pytest.raises(ConversionError, match='can be decoded, got damage'):
        compressed_to_rgb(message, 24, 32, 't')


def test_resize_keeps_the_picture_and_crop_its_centre() -> None:
    wide = np.zeros((48, 128, 3), np.uint8)
    wide[:, 32:96] = 255
    assert fit_image(wide, 24, 32, ImageFit.CROP).min() == 255
    resized = fit_image(wide, 24, 32, ImageFit.RESIZE)
    assert resized.shape == (24, 32, 3)
    assert resized[:, 0].max() == 0
    assert resized[:, 16].min() == 255
    assert fit_image(PIXELS, 24, 32, ImageFit.CROP) is PIXELS


HEIGHT, WIDTH = 3, 4
RGB = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def image(pixels: np.ndarray, encoding: str, padding: int = 0) -> SimpleNamespace:
    """Return the message of [H, W, C] pixels with padded rows."""
    rows = pixels.reshape(pixels.shape[0], -1)
    rows = np.pad(rows, ((0, 0), (0, padding)), constant_values=77)
    return SimpleNamespace(
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
    assert np.array_equal(raw_to_rgb(msg, HEIGHT, WIDTH, 'camera/image'), RGB)


def test_mono8_is_repeated_in_every_channel() -> None:
    got = raw_to_rgb(image(RGB[..., :1], 'mono8', 3), HEIGHT, WIDTH, 'camera/image')
    assert got.dtype == np.uint8
    assert np.array_equal(got, RGB[..., [0, 0, 0]])


@pytest.mark.parametrize('encoding', ['16UC1', 'mono16', 'rgb16', 'bayer_rggb8', 'yuv422', ''])
def test_other_encodings_are_refused_by_name(encoding: str) -> None:
    with pytest.raises(ConversionError, match=f"camera/image.*rgb8.*got '{encoding}'"):
        raw_to_rgb(image(RGB, encoding), HEIGHT, WIDTH, 'camera/image')


def test_another_size_is_refused() -> None:
    with pytest.raises(ConversionError, match=r'expected an image of 6 x 4 .* got 3 x 4'):
        raw_to_rgb(image(RGB, 'rgb8'), 6, 4, 'camera/image')


def test_fewer_bytes_than_height_times_step_are_refused() -> None:
    msg = image(RGB, 'rgb8')
    msg.data = msg.data[:-1]
    with pytest.raises(ConversionError, match=r'expected 36 bytes .* got 35'):
        raw_to_rgb(msg, HEIGHT, WIDTH, 'camera/image')


def test_a_step_shorter_than_a_row_is_refused() -> None:
    msg = image(RGB, 'rgb8')
    msg.step = 11
    with pytest.raises(ConversionError, match='step of at least 12 bytes'):
        raw_to_rgb(msg, HEIGHT, WIDTH, 'camera/image')
