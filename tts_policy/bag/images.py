# SPDX-License-Identifier: Apache-2.0
"""Compressed camera images to RGB, decoded only when their header promises the expected size."""

from __future__ import annotations

import struct
from typing import Any

import cv2
import numpy as np

from tts_policy.ros.conversions import ConversionError

_PNG = b'\x89PNG\r\n\x1a\n'
_JPEG = b'\xff\xd8'
# Start-of-frame markers; C4, C8 and CC in that range are something else.
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def _png_size(data: bytes) -> tuple[int, int, int]:
    """Height, width and bits per sample."""
    if data[12:16] != b'IHDR':
        raise ValueError
    width, height, bits = struct.unpack('>IIB', data[16:25])
    return height, width, bits


def _jpeg_size(data: bytes) -> tuple[int, int, int]:
    """Height, width and bits per sample, of the first frame header."""
    at = 2
    while True:
        while data[at] == 0xFF:
            at += 1
        marker = data[at]
        (length,) = struct.unpack_from('>H', data, at + 1)
        if marker in _JPEG_FRAMES:
            bits, height, width = struct.unpack_from('>BHH', data, at + 3)
            return height, width, bits
        at += 1 + length
        if data[at] != 0xFF:
            raise ValueError


def compressed_to_rgb(msg: Any, height: int, width: int, topic: str) -> np.ndarray:
    """Pixels of a jpeg or png sensor_msgs/CompressedImage as RGB.

    Returns
    -------
    numpy.ndarray
        uint8 [height, width, 3].

    Raises
    ------
    ConversionError
        for another format, depth or size, or data that do not decode.

    """
    data = bytes(memoryview(msg.data)[: 1 << 16])
    if not data.startswith((_PNG, _JPEG)):
        raise ConversionError(
            f'{topic}: expected a jpeg or png image, got {str(msg.format)[:40]!r}'
        )
    try:
        found = _png_size(data) if data.startswith(_PNG) else _jpeg_size(data)
    except (ValueError, IndexError, struct.error):
        raise ConversionError(f'{topic}: expected a jpeg or png header, it is damaged') from None
    if found != (height, width, 8):
        raise ConversionError(
            f'{topic}: expected a compressed image of {height} x {width} (height x width), 8 bit, '
            f'got {found[0]} x {found[1]}, {found[2]} bit'
        )
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    bgr = cv2.imdecode(np.frombuffer(msg.data, np.uint8), flags)
    if bgr is None or bgr.shape != (height, width, 3):
        raise ConversionError(f'{topic}: expected a jpeg or png image, its data do not decode')
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
