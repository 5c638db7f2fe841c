# SPDX-License-Identifier: Apache-2.0
"""Centre crop, as torchvision cuts it."""

from __future__ import annotations


def centre_crop(height: int, width: int, crop: tuple[int, int] | tuple[()]) -> tuple[slice, slice]:
    """Rows and columns of a crop, all where it is empty; raises ValueError if it does not fit."""
    rows, columns = crop or (height, width)
    if rows > height or columns > width:
        raise ValueError(f'crop must fit into {height} x {width}, got {rows} x {columns}')
    # Rounded half to even.
    top, left = round((height - rows) / 2), round((width - columns) / 2)
    return slice(top, top + rows), slice(left, left + columns)
