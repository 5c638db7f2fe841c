# SPDX-License-Identifier: Apache-2.0
"""Demonstrations in the replay buffer format of Diffusion Policy: a zarr v2 group, zipped or not.

`data/KEY` are arrays whose first axis is time over all episodes; `meta/episode_ends` says where
each of them ends. Chunks are decompressed one at a time, by numcodecs, or by OpenCV where they are
images in JPEG 2000; nothing else of zarr is needed to read, and nothing in the file is executed:
of the codecs that numcodecs knows, one of them pickle, those of CODECS alone are asked.
"""

from __future__ import annotations

import itertools
import json
import lzma
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tts_policy.control.images import ImageFit
from tts_policy.data.array_samples import ArraySamples, parse_selections, take_columns
from tts_policy.data.jpeg2k import CODEC, decode_jpeg2k
from tts_policy.data.reader import BagError
from tts_policy.policy.contract import PolicyContract

EPISODE_ENDS = 'meta/episode_ends'
# What the arrays of a stream are called unless it is said; a camera's is called as its key.
DEFAULT_STREAMS = {'joints': 'state', 'commands': 'action'}
MAX_ARRAY_BYTES = 8 << 30
MAX_CHUNK_BYTES = 1 << 30
# Codecs that only decompress.
CODECS = ('blosc', 'zstd', 'zlib', 'gzip', 'bz2', 'lz4', 'lzma')
# What decompression says of damaged chunks, and settings of codecs that it cannot use.
_DAMAGE = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    OSError,
    EOFError,
    MemoryError,
    zlib.error,
    lzma.LZMAError,
)


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
        for anything that is not such a file, or not whole, and for compressed chunks without
        numcodecs.

    """
    casts = stored_as or {}
    with _opened(path) as archive:
        ends = _episode_ends(path, archive)
        arrays = {key: _frames(path, archive, key, ends) for key in keys}
        data = {key: array.read(casts.get(key)) for key, array in arrays.items()}
    return ReplayBuffer(data, ends)


def is_replay_buffer(path: Path) -> bool:
    """Whether a path is called as replay buffers are: NAME.zarr, a folder, or NAME.zarr.zip."""
    return path.name.endswith(('.zarr', '.zarr.zip'))


def episodes(
    path: Path, contract: PolicyContract, streams: Mapping[str, str], fit: ImageFit
) -> list[Callable[[], ArraySamples]]:
    """Readers of all episodes, whose frames are taken to be a period of the contract apart.

    streams: arrays of camera keys, joints and commands (empty for none), see `array_samples`.

    Raises
    ------
    ReplayBufferError
        for a file that is none; the readers raise it for arrays that are not there or damaged,
        and BagError if they do not fit the contract.

    """
    with _opened(path) as archive:
        count = len(_episode_ends(path, archive))
    return [partial(_open_episode, path, n, contract, streams, fit) for n in range(count)]


def _open_episode(
    path: Path, index: int, contract: PolicyContract, streams: Mapping[str, str], fit: ImageFit
) -> ArraySamples:
    name = f'{path}: episode {index}'
    streams = {**DEFAULT_STREAMS, **streams}
    with _opened(path) as archive:
        ends = _episode_ends(path, archive)
        rows = slice(int(ends[index - 1]) if index else 0, int(ends[index]))

        def read(key: str, dtype: DTypeLike) -> NDArray[Any]:
            return _frames(path, archive, key, ends).read(dtype, rows)

        def columns(stream: str, wanted: Sequence[str]) -> NDArray[np.float64]:
            parts, names = [], []
            for selection in parse_selections(streams[stream]):
                flat = read(selection.array, np.float64).reshape(rows.stop - rows.start, -1)
                parts.append(flat[:, selection.columns])
                every = [f'{selection.array}_{i}' for i in range(flat.shape[1])]
                names += every[selection.columns]
            return take_columns(np.concatenate(parts, 1), names, wanted, f'{name}: {stream}')

        return ArraySamples(
            name,
            contract,
            contract.observation.period_s,
            columns('joints', contract.observation.joints),
            columns('commands', contract.action.joints) if streams['commands'] else None,
            {
                camera.key: read(streams.get(camera.key, camera.key), np.uint8)
                for camera in contract.observation.cameras
            },
            fit,
        )


class _Archive(Protocol):
    """What is needed of a zip file."""

    def read(self, name: str) -> bytes:
        """Content of a file; KeyError if there is none."""

    def namelist(self) -> list[str]:
        """Names of all files."""


class _Folder:
    """A folder as an archive."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, name: str) -> bytes:
        """Content of a file; KeyError if there is none."""
        try:
            return (self._path / name).read_bytes()
        except FileNotFoundError:
            raise KeyError(name) from None

    def namelist(self) -> list[str]:
        """Names of all files."""
        files = (file for file in self._path.rglob('*') if file.is_file())
        return [file.relative_to(self._path).as_posix() for file in files]


@contextmanager
def _opened(path: Path) -> Iterator[_Archive]:
    if path.is_dir():
        yield _Folder(path)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (OSError, zipfile.BadZipFile) as error:
        raise ReplayBufferError(f'{path}: a zip file expected: {error}') from error


def _episode_ends(path: Path, archive: _Archive) -> NDArray[np.int64]:
    ends = _Array(path, archive, EPISODE_ENDS).read(np.int64)
    if ends.ndim != 1 or not len(ends) or (np.diff(ends, prepend=0) <= 0).any():
        raise ReplayBufferError(f'{path}: {EPISODE_ENDS} must rise from above 0, got {ends[:8]}')
    return ends


def _frames(path: Path, archive: _Archive, key: str, ends: NDArray[np.int64]) -> _Array:
    """Array of a key, which must have a row for every frame."""
    array = _Array(path, archive, f'data/{key}')
    if not array.shape or array.shape[0] != ends[-1]:
        raise ReplayBufferError(
            f'{path}: data/{key} must have {ends[-1]} frames, got shape {array.shape}'
        )
    return array


class _Array:
    """One array of the archive: its description, read and checked, and its chunks."""

    def __init__(self, path: Path, archive: _Archive, name: str) -> None:
        self._archive, self._name, self._where = archive, name, f'{path}: {name}'
        try:
            about = json.loads(archive.read(f'{name}/.zarray'))
            self.shape = tuple(int(n) for n in about['shape'])
            self.chunks = tuple(int(n) for n in about['chunks'])
            self.dtype = np.dtype(about['dtype'])
            version, order, filters = about['zarr_format'], about['order'], about['filters']
            self._compressor, fill = about['compressor'], about['fill_value']
            self._separator = about.get('dimension_separator', '.')
        except (KeyError, ValueError, TypeError) as error:
            reason = ' '.join(str(error).split())
            raise ReplayBufferError(
                f'{self._where}: a zarr v2 array expected: {reason}'
            ) from error
        if version != 2 or order != 'C' or filters:
            raise ReplayBufferError(
                f'{self._where}: zarr_format 2, order C and no filters expected, '
                f'got {version}, {order} and {filters}'
            )
        if self.dtype.kind not in 'fiub':
            raise ReplayBufferError(f'{self._where}: numbers expected, got {self.dtype}')
        if len(self.chunks) != len(self.shape) or min((*self.chunks, 1)) < 1:
            raise ReplayBufferError(f'{self._where}: chunks {self.chunks} of shape {self.shape}')
        chunk_bytes = math.prod(self.chunks) * self.dtype.itemsize
        if min((*self.shape, 1)) < 0 or chunk_bytes > MAX_CHUNK_BYTES:
            raise ReplayBufferError(
                f'{self._where}: chunks of at most {MAX_CHUNK_BYTES} bytes expected, '
                f'got {chunk_bytes}'
            )
        try:
            self._fill = np.array(fill or 0, self.dtype).reshape(())
        except (ValueError, TypeError, OverflowError):
            raise ReplayBufferError(
                f'{self._where}: a fill value of {self.dtype} expected, got {fill!r}'
            ) from None

    def read(self, stored_as: DTypeLike | None = None, rows: slice | None = None) -> NDArray[Any]:
        """Return the array, or these rows of it, in `stored_as` if that is given."""
        dtype = np.dtype(stored_as or self.dtype)
        first, stop, _ = (rows or slice(None)).indices(self.shape[0] if self.shape else 0)
        # Whole chunks are read, and what stands before and behind the rows is cut off.
        offset = first - first % self.chunks[0] if self.shape else 0
        shape = (stop - offset, *self.shape[1:]) if self.shape else ()
        if math.prod(shape) * dtype.itemsize > MAX_ARRAY_BYTES:
            raise ReplayBufferError(
                f'{self._where}: at most {MAX_ARRAY_BYTES} bytes expected, got shape {shape}'
            )
        values = np.empty(shape, dtype)
        present = set(self._archive.namelist())
        grid = (range(-(-n // chunk)) for n, chunk in zip(shape, self.chunks, strict=True))
        for index in itertools.product(*grid):
            starts = [i * size for i, size in zip(index, self.chunks, strict=True)]
            stored = list(index)
            if stored:
                stored[0] += offset // self.chunks[0]
            name = f'{self._name}/{self._separator.join(map(str, stored))}'
            never_written = np.broadcast_to(self._fill, self.chunks)
            chunk = self._chunk(name) if name in present else never_written
            target = values[
                tuple(slice(s, s + c) for s, c in zip(starts, self.chunks, strict=True))
            ]
            part = chunk[tuple(slice(0, n) for n in target.shape)]
            if dtype.kind in 'iu' and not np.can_cast(self.dtype, dtype):
                self._check_cast(part, dtype)
            target[...] = part
        return values[first - offset :] if self.shape else values

    def _check_cast(self, values: NDArray[Any], dtype: np.dtype[Any]) -> None:
        limits = np.iinfo(dtype)
        # NaN fails both comparisons.
        if not ((values >= limits.min) & (values <= limits.max)).all():
            raise ReplayBufferError(
                f'{self._where}: values in [{limits.min}, {limits.max}] expected for {dtype}, '
                f'got {values.min()} to {values.max()}'
            )

    def _chunk(self, name: str) -> NDArray[Any]:
        try:
            raw: Any = self._archive.read(name)
            if self._compressor is not None:
                raw = self._decompress(raw)
        except _DAMAGE as error:
            reason = ' '.join(str(error).split()) or type(error).__name__
            raise ReplayBufferError(f'{self._where}: chunk {name}: {reason}') from error
        flat = np.frombuffer(raw, np.uint8)
        expected = math.prod(self.chunks) * self.dtype.itemsize
        if flat.size != expected:
            raise ReplayBufferError(
                f'{self._where}: chunk {name} must have {expected} bytes, got {flat.size}'
            )
        return flat.view(self.dtype).reshape(self.chunks)

    def _decompress(self, raw: bytes) -> Any:
        settings = dict(self._compressor)
        if settings.get('id') == CODEC:
            *rest, height, width, channels = (1, 1, 1, *self.chunks)
            if set(rest) != {1} or channels != 3 or self.dtype != np.uint8:
                raise ValueError(f'chunks of one RGB image expected, got {self.chunks}')
            return decode_jpeg2k(raw, height, width).tobytes()
        if settings.get('id') not in CODECS:
            raise ValueError(
                f'a compressor of {[*CODECS, CODEC]} expected, got {settings.get("id")!r}'
            )
        try:
            from numcodecs import get_codec
        except ImportError:
            raise ValueError(
                'the package numcodecs expected, it is not installed: '
                "pip install 'tts_policy[datasets]'"
            ) from None
        return get_codec(settings).decode(raw)
