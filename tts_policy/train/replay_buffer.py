# SPDX-License-Identifier: Apache-2.0
"""Demonstrations in the replay buffer format of Diffusion Policy: a zarr v2 group in a zip file.

`data/KEY` are arrays whose first axis is time over all episodes; `meta/episode_ends` says where
each of them ends. Chunks are decompressed by numcodecs, one at a time; nothing else of zarr is
needed to read, and nothing in the file is executed.
"""

from __future__ import annotations

import itertools
import json
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

EPISODE_ENDS = 'meta/episode_ends'
MAX_ARRAY_BYTES = 8 << 30
MAX_CHUNK_BYTES = 1 << 30


class ReplayBufferError(ValueError):
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
        for anything that is not such a file, or not whole.
    ImportError
        without numcodecs.

    """
    try:
        with zipfile.ZipFile(path) as archive:
            ends = _Array(path, archive, EPISODE_ENDS).read(np.int64)
            _check_ends(path, ends)
            arrays = {key: _Array(path, archive, f'data/{key}') for key in keys}
            for key, array in arrays.items():
                if not array.shape or array.shape[0] != ends[-1]:
                    raise ReplayBufferError(
                        f'{path}: data/{key} must have {ends[-1]} frames, got shape {array.shape}'
                    )
            casts = stored_as or {}
            data = {key: array.read(casts.get(key)) for key, array in arrays.items()}
    except (OSError, zipfile.BadZipFile) as error:
        raise ReplayBufferError(f'{path}: a zip file expected: {error}') from error
    return ReplayBuffer(data, ends)


def _check_ends(path: Path, ends: NDArray[np.int64]) -> None:
    if ends.ndim != 1 or not len(ends) or (np.diff(ends, prepend=0) <= 0).any():
        raise ReplayBufferError(f'{path}: {EPISODE_ENDS} must rise from above 0, got {ends[:8]}')


class _Array:
    """One array of the archive: its description, read and checked, and its chunks."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, name: str) -> None:
        self._archive, self._name, self._where = archive, name, f'{path}: {name}'
        try:
            about = json.loads(archive.read(f'{name}/.zarray'))
            self.shape = tuple(int(n) for n in about['shape'])
            self.chunks = tuple(int(n) for n in about['chunks'])
            self.dtype = np.dtype(about['dtype'])
            version, order, filters = about['zarr_format'], about['order'], about['filters']
            self._compressor, self._fill = about['compressor'], about['fill_value']
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

    def read(self, stored_as: DTypeLike | None = None) -> NDArray[Any]:
        """Return the whole array, in `stored_as` if that is given."""
        dtype = np.dtype(stored_as or self.dtype)
        if math.prod(self.shape) * dtype.itemsize > MAX_ARRAY_BYTES:
            raise ReplayBufferError(
                f'{self._where}: at most {MAX_ARRAY_BYTES} bytes expected, got shape {self.shape}'
            )
        values = np.full(self.shape, self._fill or 0, dtype)
        present = set(self._archive.namelist())
        grid = (range(-(-n // chunk)) for n, chunk in zip(self.shape, self.chunks, strict=True))
        for index in itertools.product(*grid):
            name = f'{self._name}/{self._separator.join(map(str, index))}'
            if name not in present:
                continue
            chunk = self._chunk(name)
            starts = [i * size for i, size in zip(index, self.chunks, strict=True)]
            target = values[
                tuple(slice(s, s + c) for s, c in zip(starts, self.chunks, strict=True))
            ]
            part = chunk[tuple(slice(0, n) for n in target.shape)]
            if dtype.kind in 'iu' and self.dtype.kind == 'f':
                self._check_cast(part, dtype)
            target[...] = part
        return values

    def _check_cast(self, values: NDArray[Any], dtype: np.dtype[Any]) -> None:
        limits = np.iinfo(dtype)
        # NaN fails both comparisons.
        if not ((values >= limits.min) & (values <= limits.max)).all():
            raise ReplayBufferError(
                f'{self._where}: values in [{limits.min}, {limits.max}] expected for {dtype}, '
                f'got {values.min()} to {values.max()}'
            )

    def _chunk(self, name: str) -> NDArray[Any]:
        raw: Any = self._archive.read(name)
        if self._compressor is not None:
            from numcodecs import get_codec

            try:
                raw = get_codec(dict(self._compressor)).decode(raw)
            except (RuntimeError, ValueError, TypeError) as error:
                raise ReplayBufferError(f'{self._where}: chunk {name}: {error}') from error
        flat = np.frombuffer(raw, np.uint8)
        expected = math.prod(self.chunks) * self.dtype.itemsize
        if flat.size != expected:
            raise ReplayBufferError(
                f'{self._where}: chunk {name} must have {expected} bytes, got {flat.size}'
            )
        return flat.view(self.dtype).reshape(self.chunks)
