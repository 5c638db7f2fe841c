# SPDX-License-Identifier: Apache-2.0
"""torch's zip checkpoints, read without executing anything, and their weights, taken by name.

A checkpoint is an uncompressed zip archive: NAME/data.pkl holds the structure, NAME/data/KEY the
bytes of every storage. Its pickle is read by `RestrictedUnpickler`. Tensors stay on disk until
they are asked for, so that optimiser states cost nothing.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from tts_policy.convert.restricted_pickle import (
    CheckpointError,
    RestrictedUnpickler,
    StoredTensor,
)
from tts_policy.policy.validation import quoted

MAX_FILE_BYTES = 16 << 30
# A byte of a pickle can ask for 70 of memory; a large policy's has a few hundred kilobytes.
MAX_PICKLE_BYTES = 4 << 20
MAX_TENSOR_BYTES = 2 << 30
MAX_ENTRIES = 100_000
# Parts of names that DistributedDataParallel and torch.compile add.
WRAPPERS = ('module', '_orig_mod')


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
            raise CheckpointError(f'{path}: expected a checkpoint file, got nothing')
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise CheckpointError(f'{path}: expected at most {MAX_FILE_BYTES} bytes, got {size}')
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise CheckpointError(
                f'{path}: expected a zip checkpoint of torch 1.6 or later, got {error}'
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
            raise CheckpointError(
                f'archive: expected at most {MAX_ENTRIES} entries, got {len(entries)}'
            )
        total = 0
        for entry in entries:
            # torch never compresses; what does is no checkpoint, and may be a bomb.
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise CheckpointError(
                    f'archive: expected no compression, got {entry.filename[:100]}'
                )
            total += entry.file_size
        if total > size:
            raise CheckpointError(
                f'archive: expected at most {size} bytes in all entries, got {total}'
            )
        names = {entry.filename: entry for entry in entries}
        if len(names) != len(entries):
            raise CheckpointError('archive: expected entries of different names, got a name twice')
        return names

    def _find_root(self) -> str:
        roots = [name.removesuffix('/data.pkl') for name in self._entries if '/data.pkl' in name]
        if len(roots) != 1 or '/' in roots[0]:
            raise CheckpointError(f'archive: expected one data.pkl, got {len(roots)}')
        return roots[0]

    def _check_byte_order(self) -> None:
        if f'{self._root}/byteorder' in self._entries:
            order = self._read('byteorder', 16)
            if order != b'little':
                raise CheckpointError(f"byte order: expected b'little', got {order!r}")

    def _read(self, name: str, limit: int) -> bytes:
        entry = self._entries.get(f'{self._root}/{name}')
        if entry is None:
            raise CheckpointError(f'{name}: expected an entry of the archive, got nothing')
        if entry.file_size > limit:
            raise CheckpointError(f'{name}: expected at most {limit} bytes, got {entry.file_size}')
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
                    f'storage {stored.key[:20]}: expected {stored.storage_size * itemsize} bytes, '
                    f'got {len(data)}'
                )
        except CheckpointError as error:
            raise CheckpointError(f'{self.path}: {error}') from error
        if math.prod(stored.shape) == 0:
            return torch.empty(stored.shape, dtype=stored.dtype)
        flat = torch.frombuffer(bytearray(data), dtype=stored.dtype)
        return flat.as_strided(stored.shape, stored.stride, stored.offset).clone()

    def weights(self, state: Any, what: str) -> WeightSource:
        """Weights of a state dictionary of this file; raises CheckpointError unless it is one."""
        if not isinstance(state, dict):
            raise CheckpointError(f'{what}: expected weights by name, got {quoted(state)}')
        for name, value in state.items():
            if not isinstance(name, str) or not isinstance(value, StoredTensor):
                raise CheckpointError(
                    f'{what}.{quoted(name)}: expected a tensor, got {quoted(value)}'
                )
        return WeightSource(state, self.tensor)


class WeightSource:
    """Named tensors in single precision; what nobody took in the end was not understood."""

    def __init__(self, tensors: Mapping[str, Any], read: Callable[[Any], Tensor]) -> None:
        """Take tensors by name, and the function that reads one when it is asked for.

        Raises
        ------
        CheckpointError
            if two names differ only in what DistributedDataParallel and torch.compile add.

        """
        own = {name: [p for p in name.split('.') if p not in WRAPPERS] for name in tensors}
        tensors = {'.'.join(own[name]): value for name, value in tensors.items()}
        if len(tensors) < len(own):
            raise CheckpointError(
                'weights: expected each name once, got one with and without a wrapper'
            )
        self.wrapped = any(len(parts) <= name.count('.') for name, parts in own.items())
        self._tensors, self._read = tensors, read
        self._left = set(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str) -> Tensor:
        """Tensor of a name; raises CheckpointError if there is none or it is not finite."""
        if name not in self._tensors:
            raise CheckpointError(f'{name}: expected a weight, got nothing')
        self._left.discard(name)
        value = self._read(self._tensors[name])
        value = value.float() if value.is_floating_point() else value
        if not torch.isfinite(value).all():
            raise CheckpointError(f'{name}: expected finite weights, got NaN or infinity')
        return value

    def shaped(self, name: str, *shape: int) -> Tensor:
        """Tensor of a name, which must have this shape."""
        value = self.take(name)
        if tuple(value.shape) != shape:
            raise CheckpointError(f'{name}: expected shape {shape}, got {tuple(value.shape)}')
        return value

    def pair(self, name: str, target: str) -> dict[str, Tensor]:
        """Weight and bias of a layer under the names of the target layer."""
        return {f'{target}.{part}': self.take(f'{name}.{part}') for part in ('weight', 'bias')}

    def ignore(self, unwanted: Callable[[str], bool]) -> None:
        """Do without the names that hold for `unwanted`."""
        self._left = {name for name in self._left if not unwanted(name)}

    def require_empty(self) -> None:
        """Raise CheckpointError if there are weights that nobody took."""
        if self._left:
            left = sorted(self._left)
            raise CheckpointError(
                f'weights: expected none left over, got {len(left)} of an unknown architecture '
                f'such as {", ".join(left[:3])}'
            )


def load_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load all weights of a module; raises CheckpointError naming what does not fit."""
    own = module.state_dict()
    for name in own.keys() | state.keys():
        if name not in state or name not in own:
            sides = ('a weight', 'nothing') if name in own else ('no such weight', 'one')
            raise CheckpointError(f'{name}: expected {sides[0]}, got {sides[1]}')
        if own[name].shape != state[name].shape:
            raise CheckpointError(
                f'{name}: expected shape {tuple(own[name].shape)}, got {tuple(state[name].shape)}'
            )
    module.load_state_dict(state)
