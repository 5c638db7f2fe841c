# SPDX-License-Identifier: Apache-2.0
"""Decompression that stops at a limit: a few kilobytes of zstd can hold gigabytes of zeros."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import BinaryIO

from lz4.frame import LZ4FrameDecompressor

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PIECE_BYTES = 1 << 20


class ExpansionError(ValueError):
    """Compressed data that expands beyond its limit, or that is not what it claims to be."""


def _pieces(data: bytes, compression: str) -> Iterator[bytes]:
    """Decompressed pieces of at most PIECE_BYTES, over as many frames as there are."""
    create: Callable[[], zstd.ZstdDecompressor | LZ4FrameDecompressor]
    create = zstd.ZstdDecompressor if compression == 'zstd' else LZ4FrameDecompressor
    while data:
        frame = create()
        piece = frame.decompress(data, PIECE_BYTES)
        yield piece
        while not frame.eof:
            if not piece and frame.needs_input:
                raise ExpansionError(f'{compression} data ends in the middle of a frame')
            piece = frame.decompress(b'', PIECE_BYTES)
            yield piece
        data = frame.unused_data or b''


def check_expansion(data: bytes, compression: str, limit: int, what: str) -> int:
    """Count what data decompress to, piece by piece; raises ExpansionError above `limit` bytes."""
    total = 0
    for piece in _pieces(data, compression):
        total += len(piece)
        if total > limit:
            raise ExpansionError(f'{what}: expected at most {limit} bytes of it, got more')
    return total


def decompress(data: bytes, limit: int, what: str) -> bytes:
    """Zstd data of at most `limit` bytes when decompressed, or ExpansionError."""
    pieces, total = [], 0
    for piece in _pieces(data, 'zstd'):
        total += len(piece)
        if total > limit:
            raise ExpansionError(f'{what}: expected at most {limit} bytes of it, got more')
        pieces.append(piece)
    return b''.join(pieces)


def decompress_file(source: BinaryIO, target: BinaryIO, limit: int, what: str) -> None:
    """Copy a zstd file decompressed; raises ExpansionError above `limit` bytes."""
    total = 0
    with zstd.open(source, 'rb') as stream:
        while piece := stream.read(PIECE_BYTES):
            total += len(piece)
            if total > limit:
                raise ExpansionError(f'{what}: expected at most {limit} bytes of it, got more')
            target.write(piece)
