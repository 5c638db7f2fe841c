# SPDX-License-Identifier: Apache-2.0
"""Chunks of images in JPEG 2000, the codec of Diffusion Policy's image caches."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

CODEC = 'imagecodecs_jpeg2k'
# Start of codestream, and the segment that follows it with the size of the image.
_START = b'\xff\x4f\xff\x51'
_SIZE_AT = len(_START) + 4


def decode_jpeg2k(data: bytes, height: int, width: int) -> NDArray[np.uint8]:
    """Image [height, width, 3] in RGB.

    Raises
    ------
    ValueError
        for what is no such image, or one of another size, which is not decoded.

    """
    start = data.find(_START)
    numbers = np.frombuffer(data[start + _SIZE_AT :][:16], '>u4').astype(np.int64)
    if start < 0 or len(numbers) < 4:
        raise ValueError('an image in JPEG 2000 expected')
    (x, y), (left, top) = numbers[:2], numbers[2:]
    if (y - top, x - left) != (height, width):
        raise ValueError(
            f'an image of {height} x {width} expected, got one of {y - top} x {x - left}'
        )
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise ValueError(' '.join(str(error).split())[:200]) from None
    if image is None or image.shape != (height, width, 3) or image.dtype != np.uint8:
        raise ValueError('an RGB image in JPEG 2000 with 8 bits a channel expected')
    return np.ascontiguousarray(image[..., ::-1])
