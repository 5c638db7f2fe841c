# SPDX-License-Identifier: Apache-2.0
"""Reader of torch's zip checkpoints that executes nothing and loads only what is asked for.

A checkpoint is an uncompressed zip archive: NAME/data.pkl holds the structure, NAME/data/KEY the
bytes of every storage. Its pickle is read by `RestrictedUnpickler`; tensors stay on disk until
`tensor` is called, so that optimiser states cost nothing.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from tts_policy.convert.restricted_pickle import (
    CheckpointError,
    RestrictedUnpickler,
    StoredTensor,
)

MAX_FILE_BYTES = 16 << 30
# A byte of a pickle can ask for 70 of memory; a large policy's has a few hundred kilobytes.
MAX_PICKLE_BYTES = 4 << 20
MAX_TENSOR_BYTES = 2 << 30
MAX_ENTRIES = 100_000


class Checkpoint:
    """An open checkpoint file; `data` holds plain containers with `StoredTensor` leaves."""

    def __init__(self, path: Path) -> None:
        """Open and check a file.

        Raises
        ------
        CheckpointError
            for a file that is no zip checkpoint, is damaged, compressed or absurdly large, or
            that names anything but tensors, containers and OmegaConf nodes.

        """
        self.path = path
        if not path.is_file():
            raise CheckpointError(f'{path}: checkpoint file expected, got nothing')
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise CheckpointError(f'{path}: at most {MAX_FILE_BYTES} bytes, got {size}')
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise CheckpointError(
                f'{path}: zip checkpoint of torch 1.6 or later expected, got {error}'
            ) from error
        try:
            self._entries = self._checked_entries(size)
            self._root = self._find_root()
            self._check_byte_order()
            self.data: Any = RestrictedUnpickler(self._read('data.pkl', MAX_PICKLE_BYTES)).read()
        except CheckpointError as error:
            self._zip.close()
            raise CheckpointError(f'{path}: {error}') from error

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._zip.close()

    def _checked_entries(self, size: int) -> dict[str, zipfile.ZipInfo]:
        entries = self._zip.infolist()
        if len(entries) > MAX_ENTRIES:
            raise CheckpointError(f'at most {MAX_ENTRIES} entries, got {len(entries)}')
        total = 0
        for entry in entries:
            # torch never compresses; what does is no checkpoint, and may be a bomb.
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise CheckpointError(f'entries must be uncompressed, got {entry.filename[:100]}')
            total += entry.file_size
        if total > size:
            raise CheckpointError(f'entries must fit into the file of {size} bytes, got {total}')
        names = {entry.filename: entry for entry in entries}
        if len(names) != len(entries):
            raise CheckpointError('entries must have different names, got a name twice')
        return names

    def _find_root(self) -> str:
        roots = [name.removesuffix('/data.pkl') for name in self._entries if '/data.pkl' in name]
        if len(roots) != 1 or '/' in roots[0]:
            raise CheckpointError(f'one data.pkl expected, got {len(roots)}')
        return roots[0]

    def _check_byte_order(self) -> None:
        if f'{self._root}/byteorder' in self._entries:
            order = self._read('byteorder', 16)
            if order != b'little':
                raise CheckpointError(f"byte order must be 'little', got {order!r}")

    def _read(self, name: str, limit: int) -> bytes:
        entry = self._entries.get(f'{self._root}/{name}')
        if entry is None:
            raise CheckpointError(f'entry {name} expected, got nothing')
        if entry.file_size > limit:
            raise CheckpointError(f'{name}: at most {limit} bytes, got {entry.file_size}')
        try:
            return self._zip.read(entry)
        except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError) as error:
            raise CheckpointError(f'{name}: {error}') from error

    def tensor(self, stored: StoredTensor) -> Tensor:
        """Read a tensor; raises CheckpointError if its storage is missing or too short."""
        itemsize = torch.empty(0, dtype=stored.dtype).element_size()
        try:
            data = self._read(f'data/{stored.key}', MAX_TENSOR_BYTES)
            if len(data) != stored.storage_size * itemsize:
                raise CheckpointError(
                    f'storage {stored.key[:20]} must have {stored.storage_size * itemsize} bytes, '
                    f'got {len(data)}'
                )
        except CheckpointError as error:
            raise CheckpointError(f'{self.path}: {error}') from error
        if math.prod(stored.shape) == 0:
            return torch.empty(stored.shape, dtype=stored.dtype)
        flat = torch.frombuffer(bytearray(data), dtype=stored.dtype)
        return flat.as_strided(stored.shape, stored.stride, stored.offset).clone()
