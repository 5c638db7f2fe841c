# SPDX-License-Identifier: Apache-2.0
"""Demonstrations in the replay buffer format of Diffusion Policy: a zarr v2 group, zipped or not.

`data/KEY` are arrays whose first axis is time over all episodes; `meta/episode_ends` says where
each of them ends. zarr reads them, an optional requirement. It is given nothing unchecked: the
description of an array is read here first, only codecs of CODECS are accepted (numcodecs also
knows pickle, which would run code), and no chunk may hold more than its description promises.
"""

from __future__ import annotations

import bz2
import json
import lzma
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import DTypeLike, NDArray

from tts_policy.control.images import ImageFit
from tts_policy.data.reader import BagError, check_expansion
from tts_policy.data.samples import ArraySamples, SampleSource, read_arrays
from tts_policy.policy.contract import PolicyContract
from tts_policy.policy.validation import quoted

EPISODE_ENDS = 'meta/episode_ends'
# The arrays of a stream, unless others are given; a camera's array has the name of its key.
DEFAULT_STREAMS = {'joints': 'state', 'commands': 'action'}
MAX_ARRAY_BYTES = 8 << 30
MAX_CHUNK_BYTES = 1 << 30
# How much is read at a time before it is cast, in chunks that are whole.
BLOCK_BYTES = 64 << 20
# JPEG 2000, the codec of Diffusion Policy's image caches; OpenCV decodes it.
JPEG2K = 'imagecodecs_jpeg2k'
CODECS = ('blosc', 'zstd', 'zlib', 'gzip', 'bz2', 'lz4', 'lzma', JPEG2K)
# JPEG 2000: start of codestream, and the segment that follows it with the size of the image.
_SIZE_MARKER = b'\xff\x4f\xff\x51'

ReadEntry = Callable[[str], bytes]


class ReplayBufferError(BagError):
    """A file that cannot be read; the message names file and array, and what was expected."""


@dataclass(frozen=True)
class ReplayBuffer:
    """Arrays [M, ...] over the M frames of all episodes, and the end of each episode."""

    data: Mapping[str, NDArray[Any]]
    episode_ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.episode_ends)

    def episode(self, index: int) -> dict[str, NDArray[Any]]:
        """Arrays of one episode, views of `data`."""
        start = self.episode_ends[index - 1] if index else 0
        return {key: value[start : self.episode_ends[index]] for key, value in self.data.items()}

    def __iter__(self) -> Iterator[dict[str, NDArray[Any]]]:
        return (self.episode(index) for index in range(len(self)))


def load_replay_buffer(
    path: Path, keys: Sequence[str], stored_as: Mapping[str, DTypeLike] | None = None
) -> ReplayBuffer:
    """Read the arrays `keys`; `stored_as` converts them, images to uint8 for instance.

    Raises
    ------
    ReplayBufferError
        for anything that is not such a file, or not whole, and if zarr is not installed.

    """
    casts = stored_as or {}
    with _opened(path) as read:
        ends = _episode_ends(path, read)
        arrays = {key: _frames(path, read, key, ends) for key in keys}
        data = {key: array.read(casts.get(key)) for key, array in arrays.items()}
    return ReplayBuffer(data, ends)


def recognises(path: Path) -> bool:
    """Whether a path has the name of a replay buffer: NAME.zarr, a folder, or NAME.zarr.zip."""
    return path.name.endswith(('.zarr', '.zarr.zip'))


def episodes(
    path: Path, contract: PolicyContract, streams: Mapping[str, str], fit: ImageFit
) -> list[Callable[[], SampleSource]]:
    """Readers of all episodes, whose frames are taken to be a period of the contract apart.

    streams: arrays of camera keys, joints and commands (empty for none), see `samples`.

    Raises
    ------
    ReplayBufferError
        for a file that is no replay buffer; the readers raise it for arrays that are missing or
        damaged, and BagError if they do not fit the contract.

    """
    with _opened(path) as read:
        count = len(_episode_ends(path, read))
    return [partial(_open_episode, path, n, contract, streams, fit) for n in range(count)]


def _open_episode(
    path: Path, index: int, contract: PolicyContract, streams: Mapping[str, str], fit: ImageFit
) -> ArraySamples:
    cameras = {camera.key: camera.key for camera in contract.observation.cameras}
    with _opened(path) as read:
        ends = _episode_ends(path, read)
        rows = slice(int(ends[index - 1]) if index else 0, int(ends[index]))

        def numbers(key: str) -> tuple[NDArray[np.float64], list[str]]:
            values = _frames(path, read, key, ends).read(np.float64, rows)
            flat = values.reshape(len(values), -1)
            return flat, [f'{key}_{i}' for i in range(flat.shape[1])]

        return read_arrays(
            f'{path}: episode {index}',
            contract,
            contract.observation.period_s,
            {**DEFAULT_STREAMS, **cameras, **streams},
            fit,
            numbers,
            lambda key: _frames(path, read, key, ends).read(np.uint8, rows),
        )


@contextmanager
def _opened(path: Path) -> Iterator[ReadEntry]:
    """Yield a function that reads a file of the group; it raises KeyError if there is none."""
    if path.is_dir():
        yield partial(_read_file, path)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            yield partial(_read_zipped, archive)
    except (OSError, zipfile.BadZipFile) as error:
        raise ReplayBufferError(f'{path}: expected a zip file, got: {error}') from error


def _read_file(folder: Path, name: str) -> bytes:
    file = folder / name
    if not file.is_file():
        raise KeyError(name)
    _check_size(file.stat().st_size)
    return file.read_bytes()


def _read_zipped(archive: zipfile.ZipFile, name: str) -> bytes:
    entry = archive.getinfo(name)
    # zipfile bounds what it inflates by this size, but not what bzip2 and LZMA expand to.
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f'expected a stored or deflated zip entry, got {entry.compress_type}')
    _check_size(entry.file_size)
    return archive.read(entry)


def _check_size(count: int) -> None:
    if count > 2 * MAX_CHUNK_BYTES:
        raise ValueError(f'expected at most {2 * MAX_CHUNK_BYTES} bytes, got {count}')


def _episode_ends(path: Path, read: ReadEntry) -> NDArray[np.int64]:
    ends = _Array(path, read, EPISODE_ENDS).read(np.int64)
    if ends.ndim != 1 or not len(ends) or (np.diff(ends, prepend=0) <= 0).any():
        raise ReplayBufferError(
            f'{path}: {EPISODE_ENDS}: expected numbers that rise from above 0, got {ends[:8]}'
        )
    return ends


def _frames(path: Path, read: ReadEntry, key: str, ends: NDArray[np.int64]) -> _Array:
    """Array of a key, which must have a row for every frame."""
    array = _Array(path, read, f'data/{key}')
    if array.shape[0] != ends[-1]:
        raise ReplayBufferError(
            f'{path}: data/{key}: expected {ends[-1]} frames, got shape {array.shape}'
        )
    return array


class _Array(Mapping[str, Any]):
    """One array, and the mapping through which zarr reads it: its description and its chunks."""

    def __init__(self, path: Path, read: ReadEntry, name: str) -> None:
        """Check the description; raises ReplayBufferError."""
        self._read, self._name, self._where = read, name, f'{path}: {name}'
        try:
            about = json.loads(read(f'{name}/.zarray'))
            self.shape = tuple(int(n) for n in about['shape'])
            self._chunks = tuple(int(n) for n in about['chunks'])
            self._dtype = np.dtype(about['dtype'])
            version, order, filters = about['zarr_format'], about['order'], about['filters']
            compressor, fill = about['compressor'], about['fill_value']
            codec = None if compressor is None else dict(compressor).get('id')
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            reason = ' '.join(str(error).split())[:200]
            raise self._error('a zarr v2 array', reason) from error
        if version != 2 or order != 'C' or filters:
            found = f'{version}, {order} and {quoted(filters)}'
            raise self._error('zarr_format 2, order C and no filters', found)
        if self._dtype.kind not in 'fiub':
            raise self._error('numbers', str(self._dtype))
        if not self.shape or len(self._chunks) != len(self.shape) or min(self._chunks) < 1:
            raise self._error('a chunk size for every axis', f'{self._chunks} of {self.shape}')
        self._chunk_bytes = math.prod(self._chunks) * self._dtype.itemsize
        if min(self.shape) < 0 or self._chunk_bytes > MAX_CHUNK_BYTES:
            raise self._error(f'chunks of at most {MAX_CHUNK_BYTES} bytes', f'{self._chunk_bytes}')
        if compressor is not None and codec not in CODECS:
            raise self._error(f'a compressor of {list(CODECS)}', quoted(codec))
        try:
            # zarr would leave memory as it is where no value is given.
            fill = 0 if fill is None else fill
            np.array(fill, self._dtype).reshape(())
        except (ValueError, TypeError, OverflowError):
            raise self._error(f'a fill value of {self._dtype}', quoted(fill)) from None
        self._codec = codec
        if codec == JPEG2K:
            *rest, _, _, channels = (1, 1, 1, *self._chunks)
            if set(rest) != {1} or channels != 3 or self._dtype != np.uint8:
                raise self._error('chunks of one RGB image', f'{self._chunks}')
            compressor = {'id': JPEG2K}
        self._about = json.dumps({**about, 'fill_value': fill, 'compressor': compressor}).encode()
        self._to_buffer: Callable[[bytes], Any] = bytes

    def _error(self, expected: str, got: str) -> ReplayBufferError:
        return ReplayBufferError(f'{self._where}: expected {expected}, got {got}')

    def read(self, stored_as: DTypeLike | None = None, rows: slice | None = None) -> NDArray[Any]:
        """Return the array, or these rows of it, in `stored_as` if that is given."""
        dtype = np.dtype(stored_as or self._dtype)
        first, stop, _ = (rows or slice(None)).indices(self.shape[0])
        shape = (stop - first, *self.shape[1:])
        if math.prod(shape) * max(dtype.itemsize, self._dtype.itemsize) > MAX_ARRAY_BYTES:
            raise self._error(f'at most {MAX_ARRAY_BYTES} bytes', f'shape {shape}')
        values = np.empty(shape, dtype)
        row_bytes = max(1, math.prod(shape[1:]) * self._dtype.itemsize)
        block = self._chunks[0] * max(1, BLOCK_BYTES // (self._chunks[0] * row_bytes))
        try:
            stored = self._open()
            for start in range(first - first % self._chunks[0], stop, block):
                at, end = max(start, first), min(start + block, stop)
                part = np.asarray(stored[at:end])
                if dtype.kind in 'iu' and not np.can_cast(self._dtype, dtype):
                    self._check_cast(part, dtype)
                values[at - first : end - first] = part
        except ReplayBufferError:
            raise
        except Exception as error:
            reason = ' '.join(str(error).split())[:200] or type(error).__name__
            raise self._error('chunks that can be decoded', reason) from error
        return values

    def _check_cast(self, values: NDArray[Any], dtype: np.dtype[Any]) -> None:
        limits = np.iinfo(dtype)
        # NaN fails both comparisons.
        if not ((values >= limits.min) & (values <= limits.max)).all():
            raise self._error(
                f'values in [{limits.min}, {limits.max}] for {dtype}',
                f'{values.min()} to {values.max()}',
            )

    def _open(self) -> Any:
        """Open the array by zarr 2, the last for Python 3.10, or zarr 3."""
        try:
            import zarr
        except ImportError:
            raise self._error(
                'the package zarr', "none: pip install 'tts_policy[datasets]'"
            ) from None
        if self._codec == JPEG2K:
            _register_jpeg2k()
        if zarr.__version__.startswith('2.'):
            return zarr.open_array(zarr.storage.KVStore(self), mode='r')
        from zarr.core.buffer import default_buffer_prototype

        self._to_buffer = default_buffer_prototype().buffer.from_bytes
        store = zarr.storage.MemoryStore(self, read_only=True)
        return zarr.open_array(store, mode='r', zarr_format=2)

    def __getitem__(self, key: str) -> Any:
        """Return what zarr asks for; KeyError for a chunk that was never written."""
        if key == '.zarray':
            return self._to_buffer(self._about)
        if key.startswith('.') or key == 'zarr.json':
            raise KeyError(key)
        try:
            data = self._read(f'{self._name}/{key}')
            self._check_chunk(data)
        except KeyError:
            raise
        except Exception as error:
            reason = ' '.join(str(error).split())[:200] or type(error).__name__
            raise ReplayBufferError(
                f'{self._where}: chunk {self._name}/{key}: {reason}'
            ) from error
        return self._to_buffer(data)

    def __iter__(self) -> Iterator[str]:
        return iter(('.zarray',))

    def __len__(self) -> int:
        return 1

    def _check_chunk(self, data: bytes) -> None:
        """Refuse a chunk that would not decompress to exactly what the array promises."""
        if self._codec == JPEG2K:
            height, width = self._chunks[-3:-1]
            _check_jpeg2k(data, height, width)
            return
        count = _expanded_bytes(data, self._codec, self._chunk_bytes + 1)
        if count != self._chunk_bytes:
            raise ValueError(f'expected {self._chunk_bytes} bytes, got {count}')


def _expanded_bytes(data: bytes, codec: str | None, limit: int) -> int:
    """Bytes that compressed data hold: as their header says, or counted up to `limit`."""
    if codec is None:
        return len(data)
    if codec == 'blosc':
        if len(data) < 16:
            raise ValueError(f'expected a header of 16 bytes, got {len(data)}')
        return int.from_bytes(data[4:8], 'little')
    if codec == 'lz4':
        return int.from_bytes(data[:4], 'little')
    if codec == 'zstd':
        return check_expansion(data, codec, limit, 'chunk')
    decoder: Any
    if codec == 'bz2':
        decoder = bz2.BZ2Decompressor()
    elif codec == 'lzma':
        decoder = lzma.LZMADecompressor()
    else:
        decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)
    count = len(decoder.decompress(data, limit))
    if count < limit and not decoder.eof:
        raise ValueError(f'expected {codec} data, got them cut short')
    return count


@cache
def _register_jpeg2k() -> None:
    """Teach numcodecs to decode JPEG 2000 with OpenCV."""
    from numcodecs.abc import Codec
    from numcodecs.compat import ensure_contiguous_ndarray, ndarray_copy
    from numcodecs.registry import register_codec

    class Jpeg2k(Codec):
        """Chunks of one RGB image [height, width, 3], whose size was checked."""

        codec_id = JPEG2K

        def encode(self, buf: Any) -> Any:
            raise NotImplementedError

        def decode(self, buf: Any, out: Any = None) -> Any:
            image = cv2.imdecode(ensure_contiguous_ndarray(buf), cv2.IMREAD_UNCHANGED)
            if image is None or image.shape[2:] != (3,) or image.dtype != np.uint8:
                raise ValueError('expected an RGB image with 8 bits a channel, got another')
            return ndarray_copy(np.ascontiguousarray(image[..., ::-1]), out)

    register_codec(Jpeg2k)


def _check_jpeg2k(data: bytes, height: int, width: int) -> None:
    """Refuse an image of another size by its header, before it is decoded."""
    start = data.find(_SIZE_MARKER)
    numbers = np.frombuffer(data[start + len(_SIZE_MARKER) + 4 :][:16], '>u4').astype(np.int64)
    if start < 0 or len(numbers) < 4:
        raise ValueError('expected an image in JPEG 2000, got other bytes')
    (x, y), (left, top) = numbers[:2], numbers[2:]
    if (y - top, x - left) != (height, width):
        raise ValueError(
            f'expected an image of {height} x {width}, got one of {y - top} x {x - left}'
        )
