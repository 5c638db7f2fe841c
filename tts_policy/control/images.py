# SPDX-License-Identifier: Apache-2.0
"""Images as RGB pixels of the size that the model was trained with.

The size of a compressed image is read from its header first: nothing that is larger than allowed,
or is neither jpeg nor png, reaches the decoder.
"""

from __future__ import annotations

import struct
from enum import Enum
from typing import Protocol

import cv2
import numpy as np

from tts_policy.control.conversions import ConversionError

# Pixels a side that are decoded at most, where another size than the model's is accepted.
MAX_SIDE = 4096
# Steps from one marker of a jpeg to the next before its size; a camera's has less than twenty.
MAX_MARKERS = 1000
_PNG = b'\x89PNG\r\n\x1a\n'
_JPEG = b'\xff\xd8'
# Channels of each accepted encoding, and which of them are red, green and blue.
_ENCODINGS: dict[str, tuple[int, tuple[int, int, int]]] = {
    'rgb8': (3, (0, 1, 2)),
    'bgr8': (3, (2, 1, 0)),
    'rgba8': (4, (0, 1, 2)),
    'bgra8': (4, (2, 1, 0)),
    'mono8': (1, (0, 0, 0)),
}
# Start-of-frame markers hold the size; C4, C8 and CC of that range are something else.
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class ImageMessage(Protocol):
    """What is read of a sensor_msgs/Image."""

    height: int
    width: int
    encoding: str
    step: int
    data: bytes


class CompressedMessage(Protocol):
    """What is read of a sensor_msgs/CompressedImage."""

    format: str
    data: bytes


class ImageFit(Enum):
    """What is done with an image of another size than the contract's."""

    EXACT = 'exact'
    RESIZE = 'resize'
    CROP = 'crop'


def encoded_size(data: bytes) -> tuple[int, int] | None:
    """Height and width that a png or jpeg header promises; None when there is no such header."""
    if data[:8] == _PNG and data[12:16] == b'IHDR' and len(data) >= 24:
        width, height = struct.unpack('>II', data[16:24])
        return height, width
    if data[:2] != _JPEG:
        return None
    at = 2
    for _ in range(MAX_MARKERS):
        if at + 9 > len(data) or data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker in _START_OF_FRAME:
            height, width = struct.unpack('>HH', data[at + 5 : at + 9])
            return height, width
        # A fill byte stands alone, every other segment before the frame tells its length.
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], 'big')
    return None


def raw_to_rgb(
    msg: ImageMessage, height: int, width: int, topic: str, fit: ImageFit = ImageFit.EXACT
) -> np.ndarray:
    """Pixels of an 8-bit image as RGB, brought to the size asked for where `fit` allows it.

    Parameters
    ----------
    msg
        rgb8, bgr8, rgba8, bgra8 or mono8; rows may be padded (step larger than the row).
    height, width
        size of the model's images in pixels.
    topic
        named in the error.
    fit
        what is done with an image of another size.

    Returns
    -------
    numpy.ndarray
        uint8 [height, width, 3]; it may share memory with the message.

    Raises
    ------
    ConversionError
        for another encoding, a size that is not accepted, or fewer bytes than the header promises.

    """
    check_size((msg.height, msg.width), height, width, topic, fit)
    return fit_image(_pixels(msg, topic), height, width, fit)


def _pixels(msg: ImageMessage, topic: str) -> np.ndarray:
    """Return uint8 RGB [height, width, 3] of the message's own size."""
    if msg.encoding not in _ENCODINGS:
        raise ConversionError(
            f'{topic}: expected encoding {", ".join(_ENCODINGS)}, got {msg.encoding!r}'
        )
    height, width = msg.height, msg.width
    channels, order = _ENCODINGS[msg.encoding]
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


def compressed_to_rgb(
    msg: CompressedMessage,
    height: int,
    width: int,
    topic: str,
    fit: ImageFit = ImageFit.EXACT,
) -> np.ndarray:
    """Pixels of a jpeg or png of 8 bits as RGB.

    Returns
    -------
    numpy.ndarray
        uint8 [height, width, 3].

    Raises
    ------
    ConversionError
        for another format or depth, a size that is not accepted, or data that cannot be decoded.

    """
    data = bytes(msg.data)
    size = encoded_size(data)
    if size is None:
        raise ConversionError(
            f'{topic}: expected a jpeg or png, got {len(data)} bytes of format {msg.format!r}'
        )
    check_size(size, height, width, topic, fit)
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        pixels = None
    if pixels is None or pixels.shape[:2] != size:
        raise ConversionError(f'{topic}: expected {msg.format!r} that can be decoded, got damage')
    if pixels.dtype != np.uint8:
        raise ConversionError(f'{topic}: expected 8 bits a channel, got {pixels.dtype}')
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    if channels not in (1, 3, 4):
        raise ConversionError(f'{topic}: expected 1, 3 or 4 channels, got {channels}')
    # imdecode takes the file for one that holds blue first, as cv2 encodes it.
    to_rgb = {1: cv2.COLOR_GRAY2RGB, 3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGB}[channels]
    if channels > 1 and _encoded_red_first(msg.format):
        pixels = pixels[..., :3]
    else:
        pixels = cv2.cvtColor(pixels, to_rgb)
    return fit_image(np.ascontiguousarray(pixels), height, width, fit)


def _encoded_red_first(form: str) -> bool:
    """Whether colours were encoded in the order red, green, blue, as a format string says.

    `ORIGINAL; jpeg compressed STORED` is written by image_transport, whose subscriber takes STORED
    for red first unless it begins with bgr, if ORIGINAL is a colour. Other strings do not say.
    """
    original, separator, stored = form.partition(';')
    colour = original.strip().lower().startswith(('rgb', 'bgr'))
    return bool(separator) and colour and 'compressed bgr' not in stored


def check_size(size: tuple[int, int], height: int, width: int, topic: str, fit: ImageFit) -> None:
    """Check the size of an image before anything is done with it.

    Raises
    ------
    ConversionError
        naming the size expected and the one that came.

    """
    if fit is ImageFit.EXACT:
        accepted = size == (height, width)
        expected = f'an image of {height} x {width} (height x width)'
    else:
        accepted = all(1 <= side <= MAX_SIDE for side in size)
        expected = f'an image of 1 to {MAX_SIDE} pixels a side'
    if not accepted:
        raise ConversionError(f'{topic}: expected {expected}, got {size[0]} x {size[1]}')


def fit_image(pixels: np.ndarray, height: int, width: int, fit: ImageFit) -> np.ndarray:
    """Bring an image [H, W, 3] to the model's size: averaged where it shrinks, else bilinear."""
    if pixels.shape[:2] == (height, width):
        return pixels
    if fit is ImageFit.CROP:
        scale = min(pixels.shape[0] / height, pixels.shape[1] / width)
        rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
        top, left = (pixels.shape[0] - rows) // 2, (pixels.shape[1] - columns) // 2
        pixels = pixels[top : top + rows, left : left + columns]
    shrinks = pixels.shape[0] >= height and pixels.shape[1] >= width
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(np.ascontiguousarray(pixels), (width, height), interpolation=interpolation)
