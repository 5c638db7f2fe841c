# SPDX-License-Identifier: Apache-2.0
"""An unpickler that builds plain data and nothing else.

A pickle is a program for a small stack machine that may call whatever it can name. This one knows
the opcodes and the few names that tensors, containers and OmegaConf nodes need. Tensors become
`StoredTensor`, everything else that is an object becomes a `Record`: its name and its state. Any
other name is refused before anything is imported.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any, ClassVar

import torch

from tts_policy.policy.validation import quoted

_LONGEST = 1000
_LONGEST_KEY = 16


class CheckpointError(ValueError):
    """A checkpoint that is damaged, unsafe or of an unknown kind; the message says why."""

    def __init__(self, message: str) -> None:
        # Names in a file can be as long as the file.
        super().__init__(message if len(message) <= _LONGEST else f'{message[:_LONGEST]} ...')


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a checkpoint: a part of the storage `key`; counts are elements."""

    key: str
    dtype: torch.dtype
    storage_size: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Record:
    """An object of the file as data: `name` of its class, `state` as it was pickled."""

    name: ClassVar[str] = ''
    state: Any = None

    def __init__(self, *_: object) -> None:
        """Take any arguments, as pickled constructor calls come with some."""

    def __setstate__(self, state: object) -> None:
        """Keep the state."""
        self.state = state


_STORAGES = {
    'FloatStorage': torch.float32,
    'DoubleStorage': torch.float64,
    'HalfStorage': torch.float16,
    'BFloat16Storage': torch.bfloat16,
    'LongStorage': torch.int64,
    'IntStorage': torch.int32,
    'ShortStorage': torch.int16,
    'CharStorage': torch.int8,
    'ByteStorage': torch.uint8,
    'BoolStorage': torch.bool,
}
# Objects of these classes are data to us: configuration nodes, their type annotations, and the
# numpy scalars that some trainers store as metrics.
_RECORDS = {
    'omegaconf.base': ('ContainerMetadata', 'Metadata'),
    'omegaconf.dictconfig': ('DictConfig',),
    'omegaconf.listconfig': ('ListConfig',),
    'omegaconf.nodes': (
        'AnyNode',
        'BooleanNode',
        'BytesNode',
        'EnumNode',
        'FloatNode',
        'IntegerNode',
        'InterpolationResultNode',
        'PathNode',
        'StringNode',
    ),
    'typing': ('Any', 'Dict', 'List', 'Optional', 'Tuple', 'Union'),
    'builtins': ('bool', 'dict', 'float', 'int', 'list', 'object', 'str', 'tuple'),
    'numpy': ('dtype',),
    'torch': tuple(_STORAGES),
}
_OPCODES = (
    *('PROTO', 'FRAME', 'STOP', 'MARK', 'POP', 'POP_MARK', 'DUP', 'NONE', 'NEWTRUE', 'NEWFALSE'),
    *('INT', 'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1', 'LONG4', 'FLOAT', 'BINFLOAT'),
    *('UNICODE', 'BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8'),
    *('BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8'),
    *('EMPTY_TUPLE', 'TUPLE', 'TUPLE1', 'TUPLE2', 'TUPLE3', 'EMPTY_LIST', 'LIST'),
    *('APPEND', 'APPENDS', 'EMPTY_DICT', 'DICT', 'SETITEM', 'SETITEMS'),
    *('GET', 'BINGET', 'LONG_BINGET', 'PUT', 'BINPUT', 'LONG_BINPUT', 'MEMOIZE'),
    *('GLOBAL', 'STACK_GLOBAL', 'REDUCE', 'BUILD', 'NEWOBJ', 'BINPERSID'),
)
_DAMAGED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)


def _check_key(key: object) -> None:
    # Hashing a nest of tuples that share their parts takes time exponential in its depth. So does
    # printing one, which is why messages quote values with `quoted`. OmegaConf's cache of resolved
    # values has keys that are flat tuples.
    parts = key if isinstance(key, tuple) and len(key) <= _LONGEST_KEY else (key,)
    for part in parts:
        if not isinstance(part, (str, int, float, bool)) and part is not None:
            raise CheckpointError(
                'dictionary key: expected text, a number or a short tuple of them, '
                f'got {quoted(part)}'
            )


def _opaque(*_: object) -> type[Record]:
    """Stand in for a call whose result is a type or of no use here."""
    # One class for all: a class for every call would cost a kilobyte for every few bytes of file.
    return Record


class _Mapping(dict[Any, Any]):
    """A dictionary whose attributes, such as the version table of a state_dict, are dropped."""

    def __setstate__(self, state: object) -> None:
        """Drop the state."""


def _tensor(
    storage: tuple[str, torch.dtype, int],
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    *_: object,
) -> StoredTensor:
    """Stand in for `torch._utils._rebuild_tensor_v2`."""
    key, dtype, size = storage
    if len(shape) != len(stride) or len(shape) > 8:
        raise CheckpointError(
            f'tensor: expected matching shape and stride, got {quoted(shape)}, {quoted(stride)}'
        )
    counts = (offset, *shape, *stride)
    if not all(isinstance(count, int) and 0 <= count < 1 << 40 for count in counts):
        raise CheckpointError(f'tensor: expected sizes in [0, 2^40), got {quoted(counts)}')
    last, elements = offset, 1
    for length, step in zip(shape, stride, strict=True):
        elements *= length
        last += (length - 1) * step
    # Without the second condition a stride of zero makes a huge tensor of a small storage.
    if elements and (last >= size or elements > size):
        raise CheckpointError(
            f'tensor: expected a part of its storage of {size} elements, '
            f'got {quoted(shape)} from {offset}'
        )
    return StoredTensor(key, dtype, size, offset, tuple(shape), tuple(stride))


def _parameter(data: StoredTensor, *_: object) -> StoredTensor:
    return data


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ('torch._utils', '_rebuild_tensor_v2'): _tensor,
    ('torch._utils', '_rebuild_parameter'): _parameter,
    ('copyreg', '_reconstructor'): lambda cls, *_: cls(),
    ('operator', 'getitem'): _opaque,
    ('_operator', 'getitem'): _opaque,
    ('dill._dill', '_load_type'): _opaque,
    ('numpy.core.multiarray', 'scalar'): _opaque,
    ('numpy._core.multiarray', 'scalar'): _opaque,
}
# Calls that copy what they are given; the unpickler counts the copies.
_COPIES = {
    ('collections', 'OrderedDict'): '_mapping',
    ('collections', 'defaultdict'): '_mapping',
    ('_codecs', 'encode'): '_encode',
    ('builtins', 'bytes'): '_encode',
}
_RENAMED = {'__builtin__': 'builtins', 'copy_reg': 'copyreg'}  # as protocol 2 names them


def _checked_item(unpickler: Any) -> None:
    _check_key(unpickler.stack[-2])
    pickle._Unpickler.load_setitem(unpickler)  # type: ignore[attr-defined]


def _checked_items(unpickler: Any) -> None:
    for key in unpickler.stack[::2]:
        _check_key(key)
    pickle._Unpickler.load_setitems(unpickler)  # type: ignore[attr-defined]


def _checked_dict(unpickler: Any) -> None:
    for key in unpickler.stack[::2]:
        _check_key(key)
    pickle._Unpickler.load_dict(unpickler)  # type: ignore[attr-defined]


class RestrictedUnpickler(pickle._Unpickler):
    """Builds plain data of one pickle; written in Python, so that no opcode is out of reach."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        **{
            getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
            for name in _OPCODES
        },
        pickle.SETITEM[0]: _checked_item,
        pickle.SETITEMS[0]: _checked_items,
        pickle.DICT[0]: _checked_dict,
    }

    def __init__(self, data: bytes) -> None:
        super().__init__(BytesIO(data))
        self._classes: dict[str, type[Record]] = {}
        # A value that stands in the file once can be copied as often as there are bytes left to
        # ask for it. A file that pickle wrote copies every byte and every item once at most.
        self._copies_left = len(data)

    def read(self) -> Any:
        """Read the data.

        Raises
        ------
        CheckpointError
            for a name that is not known to be harmless, or damaged data.

        """
        try:
            return self.load()
        except CheckpointError:
            raise
        except _DAMAGED as error:
            reason = ' '.join(str(error).split())[:200]
            raise CheckpointError(f'damaged pickle: {type(error).__name__} {reason}') from error

    def find_class(self, module: str, name: str) -> Any:
        """Stand-in for a name; raises CheckpointError for any that is not known."""
        module = _RENAMED.get(module, module)
        if (module, name) in _COPIES:
            return getattr(self, _COPIES[module, name])
        if (module, name) in _FUNCTIONS:
            return _FUNCTIONS[module, name]
        if name not in _RECORDS.get(module, ()):
            raise CheckpointError(
                f'pickle: expected tensors, containers and OmegaConf nodes, got {module}.{name}'[
                    :300
                ]
            )
        full = f'{module}.{name}'
        if full not in self._classes:
            # A class of this file alone: what the pickle may do to it, it does to nothing else.
            self._classes[full] = type('Record', (Record,), {'name': full})
        return self._classes[full]

    def _count(self, copies: int) -> None:
        self._copies_left -= copies
        if self._copies_left < 0:
            raise CheckpointError(
                'pickle: expected every value to be copied once, got more copies'
            )

    def _mapping(self, *args: Any) -> dict[Any, Any]:
        """Stand in for the constructors of OrderedDict and defaultdict."""
        items = args[-1] if args and isinstance(args[-1], (list, tuple)) else ()
        self._count(len(items))
        result = _Mapping()
        for key, value in items:
            _check_key(key)
            result[key] = value
        return result

    def _encode(self, text: str = '', encoding: str = 'latin1') -> bytes:
        """Stand in for `_codecs.encode`, which is how protocol 2 writes bytes."""
        if encoding != 'latin1' or not isinstance(text, str):
            raise CheckpointError(
                f"bytes: expected text encoded as 'latin1', got {quoted(encoding)}"
            )
        self._count(len(text))
        return text.encode('latin1')

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype, int]:
        """Storage key, type and number of elements of a persistent id."""
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != 'storage':
            raise CheckpointError(f'persistent id: expected one of a storage, got {quoted(pid)}')
        _, kind, key, _, size = pid
        name = kind.name if isinstance(kind, type) and issubclass(kind, Record) else ''
        dtype = _STORAGES.get(name.removeprefix('torch.'))
        if dtype is None or not isinstance(key, str) or not isinstance(size, int) or size < 0:
            raise CheckpointError(f'storage: expected type, key and size, got {quoted(pid)}')
        return key, dtype, size


MAX_DEPTH = 64
MAX_NODES = 100_000


def plain(value: Any) -> Any:
    """Configuration nodes as plain dictionaries, lists and scalars.

    Raises
    ------
    CheckpointError
        for nodes nested too deep or too many of them, or something else than a configuration. A
        container that is shared counts every time: nested ones can name each other a billionfold.

    """
    return _plain(value, MAX_DEPTH, iter(range(MAX_NODES)))


def _plain(value: Any, depth: int, budget: Iterator[int]) -> Any:
    if depth == 0:
        raise CheckpointError(f'configuration: expected at most {MAX_DEPTH} levels, got more')
    if next(budget, None) is None:
        raise CheckpointError(f'configuration: expected at most {MAX_NODES} nodes, got more')
    if isinstance(value, Record):
        state = value.state if isinstance(value.state, dict) else {}
        content = state['_content'] if '_content' in state else state.get('_val')
        return _plain(content, depth - 1, budget)
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise CheckpointError(f'configuration: expected text as keys, got {quoted(key)}')
        return {key: _plain(item, depth - 1, budget) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth - 1, budget) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(f'configuration: expected plain data, got {type(value).__name__}')
