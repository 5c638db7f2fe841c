# SPDX-License-Identifier: Apache-2.0
"""Centre crop, as torchvision cuts it."""

from __future__ import annotations

from typing import Any


def is_side(value: Any) -> bool:
    """Whether this can be the height or width, in pixels, of an image that is cut or scaled."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 2048


def centre_crop(height: int, width: int, crop: tuple[int, int] | tuple[()]) -> tuple[slice, slice]:
    """Rows and columns of a crop, all where it is empty; raises ValueError if it does not fit."""
    rows, columns = crop or (height, width)
    if rows > height or columns > width:
        raise ValueError(f'crop must fit into {height} x {width}, got {rows} x {columns}')
    # Rounded half to even.
    top, left = round((height - rows) / 2), round((width - columns) / 2)
    return slice(top, top + rows), slice(left, left + columns)
