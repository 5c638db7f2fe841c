# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: what torch wrote is read back, and nothing in a file is ever executed."""

from __future__ import annotations

import collections
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_policy.convert.checkpoint import Checkpoint
from tts_policy.convert.configuration import NoiseScheduler, read_settings
from tts_policy.convert.restricted_pickle import (
    CheckpointError,
    Record,
    RestrictedUnpickler,
    plain,
)


class _Call:
    """Pickles as a call of `function`, the classic attack."""

    def __init__(self, function: Callable[..., Any], *args: object) -> None:
        self._call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self._call


def _archive(
    path: Path, data: bytes, compression: int = zipfile.ZIP_STORED, **more: bytes
) -> Path:
    with zipfile.ZipFile(path, 'w', compression) as archive:
        archive.writestr('archive/data.pkl', data)
        for name, content in more.items():
            archive.writestr(f'archive/{name}', content)
    return path


def _storage(data: bytes) -> bytes:
    """Pickle opcodes that push the storage '0' of `size` floats."""
    return (
        b'(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu'
        + data
        + b'tQ'
    )


def _tensor(offset: bytes, shape: bytes, stride: bytes, size: bytes = b'K\x04') -> bytes:
    head = b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n('
    return head + _storage(size) + offset + shape + stride + b'\x89}tR.'


def test_a_checkpoint_of_torch_is_read_back(tmp_path: Path) -> None:
    weight = torch.arange(12.0).view(3, 4)
    payload = {
        'state': collections.OrderedDict(
            weight=weight,
            transposed=weight.T,
            part=weight[1:, 1],
            half=weight.half(),
            brain=weight.bfloat16(),
            counter=torch.tensor(7),
            mask=weight > 3,
            empty=torch.zeros(0, 2),
            parameter=torch.nn.Parameter(weight),
        ),
        'metrics': {'loss': np.float64(0.5), 'epoch': 3, 'betas': (0.9, 0.95), 'raw': b'\x00\xff'},
    }
    torch.save(payload, tmp_path / 'a.ckpt')
    with Checkpoint(tmp_path / 'a.ckpt') as checkpoint:
        for name, value in payload['state'].items():
            read = checkpoint.tensor(checkpoint.data['state'][name])
            assert read.dtype == value.dtype and torch.equal(read, value), name
        metrics = checkpoint.data['metrics']
    assert metrics['epoch'] == 3 and metrics['betas'] == (0.9, 0.95)
    assert metrics['raw'] == b'\x00\xff'


def test_configuration_nodes_become_plain_data() -> None:
    node = type('AnyNode', (), {'__module__': 'omegaconf.nodes'})
    mapping = type('DictConfig', (), {'__module__': 'omegaconf.dictconfig'})
    sequence = type('ListConfig', (), {'__module__': 'omegaconf.listconfig'})

    def make(kind: type, **state: object) -> Any:
        made = kind()
        made.__dict__.update(state)
        return made

    rows = make(sequence, _content=[make(node, _val=1), make(node, _val=None)])
    tree = make(mapping, _content={'rows': rows, 'name': make(node, _val='x')})
    rows._parent = tree
    read = RestrictedUnpickler(_without_lookup(tree)).read()
    assert isinstance(read, Record)
    assert plain(read) == {'rows': [1, None], 'name': 'x'}


def _without_lookup(value: object) -> bytes:
    """Pickle with class names taken at their word."""

    class Pickler(pickle._Pickler):
        def save_global(self, obj: Any, name: str | None = None) -> None:
            self.write(f'c{obj.__module__}\n{name or obj.__name__}\n'.encode())
            self.memoize(obj)

        dispatch: ClassVar[dict[type, Any]] = {
            **pickle._Pickler.dispatch,
            type: save_global,
        }

    out = BytesIO()
    Pickler(out, protocol=2).dump(value)
    return out.getvalue()


@pytest.mark.parametrize(
    ('name', 'attack'),
    [
        ('posix.system', lambda marker: _Call(os.system, f'touch {marker}')),
        ('builtins.eval', lambda marker: _Call(eval, f'open({str(marker)!r}, "w")')),
        ('builtins.exec', lambda marker: _Call(exec, f'open({str(marker)!r}, "w")')),
        ('builtins.getattr', lambda marker: _Call(getattr, {}, 'clear')),
        ('posix.mkdir', lambda marker: {'state': [_Call(os.mkdir, str(marker))]}),
        ('torch.load', lambda marker: _Call(torch.load, str(marker))),
        ('posix.mkdir', lambda marker: {'now': {('%Y', _Call(os.mkdir, str(marker))): 1}}),
    ],
)
def test_a_name_that_is_not_known_is_refused_before_it_is_called(
    tmp_path: Path, name: str, attack: Callable[[Path], object]
) -> None:
    marker = tmp_path / 'executed'
    for protocol in (2, 4):
        path = _archive(tmp_path / 'a.ckpt', pickle.dumps(attack(marker), protocol))
        module, _, function = name.rpartition('.')
        with pytest.raises(CheckpointError, match=rf'got {module}.*\.{function}') as caught:
            Checkpoint(path)
        assert '\n' not in str(caught.value) and str(path) in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize(
    ('data', 'reason'),
    [
        pytest.param(
            b'cos\nsystem\n(X\x04\x00\x00\x00truetR.', r'got os\.system', id='protocol 0'
        ),
        pytest.param(b'(ios\nsystem\n.', 'damaged pickle', id='INST'),
        pytest.param(b'\x82\x01.', 'damaged pickle', id='extension registry'),
        pytest.param(b'\x80\x05\x96' + b'\xff' * 7 + b'\x7f.', 'damaged pickle', id='bytearray'),
        pytest.param(b'\x80\x02' + b'(' * 10, 'damaged pickle', id='cut off'),
        pytest.param(b'', 'damaged pickle', id='empty'),
        pytest.param(
            b'\x80\x02ctorch\nFloatStorage\n}(X\x01\x00\x00\x00aK\x01ub.', '', id='BUILD'
        ),
        pytest.param(
            b'\x80\x02)' + b'q\x00h\x00\x86' * 60 + b'}q\x01h\x00Ns.',
            'dictionary key: expected text, a number or a short tuple',
            id='exponential hash',
        ),
        pytest.param(
            b'\x80\x02)' + b'q\x00h\x00\x86' * 60 + b'Q.',
            'persistent id: expected one of a storage',
            id='exponential message',
        ),
        pytest.param(
            _tensor(b'K\x00', b'K\x05\x85', b'K\x01\x85'),
            'expected a part of its storage',
            id='long',
        ),
        pytest.param(
            _tensor(b'K\x04', b'K\x01\x85', b'K\x01\x85'),
            'expected a part of its storage',
            id='past',
        ),
        pytest.param(
            _tensor(b'K\x00', b'K\xff\x85', b'K\x00\x85'),
            'expected a part of its storage',
            id='wide',
        ),
        pytest.param(_tensor(b'J\xff\xff\xff\xff', b'K\x01\x85', b'K\x01\x85'), 'sizes', id='low'),
        pytest.param(_tensor(b'K\x00', b'K\x01\x85', b')'), 'matching shape', id='no stride'),
        pytest.param(
            b'\x80\x02(X\x07\x00\x00\x00storageccollections\nOrderedDict\nK\x00K\x00K\x00tQ.',
            'storage: expected type',
            id='storage of something else',
        ),
    ],
)
def test_a_pickle_that_is_unsafe_or_damaged_is_refused(
    tmp_path: Path, data: bytes, reason: str
) -> None:
    path = _archive(tmp_path / 'a.ckpt', data)
    before = dict(vars(Record))
    if reason:
        with pytest.raises(CheckpointError, match=reason):
            Checkpoint(path)
    else:
        with pytest.raises(CheckpointError):
            Checkpoint(path)
    assert dict(vars(Record)) == before


def _repeated(call: bytes, memo: bytes) -> bytes:
    """Pickle that calls a function 20,000 times with the same memoised arguments."""
    return b'\x80\x02' + call + b'q\x00' + memo + b'q\x01(' + b'h\x00h\x01R' * 20_000 + b't.'


_LONG_TEXT = b'X' + struct.pack('<I', 100_000) + b'a' * 100_000
_MANY_PAIRS = b'](' + b''.join(b'J%b]\x86' % struct.pack('<i', n) for n in range(10_000)) + b'e'


@pytest.mark.parametrize(
    'data',
    [
        _repeated(b'c_codecs\nencode\n', _LONG_TEXT + b'X\x06\x00\x00\x00latin1\x86'),
        _repeated(b'c__builtin__\nbytes\n', _LONG_TEXT + b'X\x06\x00\x00\x00latin1\x86'),
        _repeated(b'ccollections\nOrderedDict\n', _MANY_PAIRS + b'\x85'),
        _repeated(b'ccollections\ndefaultdict\n', b'N' + _MANY_PAIRS + b'\x86'),
    ],
    ids=['encode', 'bytes', 'OrderedDict', 'defaultdict'],
)
def test_a_value_that_is_copied_again_and_again_is_refused_before_it_fills_the_memory(
    data: bytes,
) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match='expected every value to be copied once'):
            RestrictedUnpickler(data).read()
        assert tracemalloc.get_traced_memory()[1] < 100 * len(data)
    finally:
        tracemalloc.stop()


def test_keys_are_flat_tuples_at_most() -> None:
    resolved = {'now': {('%Y', 2): '2026', (): 'x'}}
    assert RestrictedUnpickler(pickle.dumps(resolved, 2)).read() == resolved
    for key in (('a', ('b',)), tuple('a' * 17)):
        with pytest.raises(CheckpointError, match='text, a number or a short tuple'):
            RestrictedUnpickler(pickle.dumps({key: 1}, 2)).read()


def test_a_message_about_a_long_value_is_short() -> None:
    leaf = 'a' * 100_000
    wide = [[leaf] * 1000] * 50
    with pytest.raises(CheckpointError) as caught:
        read_settings(NoiseScheduler, {'_target_': wide, leaf: wide}, 'cfg')
    assert len(str(caught.value)) < 2000


def test_classes_of_one_file_are_out_of_reach_of_the_next() -> None:
    # BUILD with slot state sets attributes of the class itself.
    poison = b'\x80\x02ctorch\nFloatStorage\nN}X\x04\x00\x00\x00nameX\x01\x00\x00\x00xs\x86b.'
    with pytest.raises(CheckpointError, match='damaged pickle'):
        RestrictedUnpickler(poison).read()
    clean = RestrictedUnpickler(b'\x80\x02ctorch\nFloatStorage\n.').read()
    assert clean.name == 'torch.FloatStorage' and Record.name == ''


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    bomb = _archive(tmp_path / 'a.ckpt', b'\x80\x02' + bytes(1 << 24), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match='expected no compression'):
        Checkpoint(bomb)


def test_a_pickle_that_is_absurdly_long_is_refused_unread(tmp_path: Path) -> None:
    path = _archive(tmp_path / 'a.ckpt', b'\x80\x02' + b']' * (4 << 20) + b'.')
    with pytest.raises(
        CheckpointError, match=r'data\.pkl: expected at most 4194304 bytes, got 4194307'
    ):
        Checkpoint(path)


def test_entries_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    path = _archive(tmp_path / 'a.ckpt', b'\x80\x02N.', **{'data/0': bytes(4096)})
    content = path.read_bytes()
    directory = content.rindex(b'PK\x01\x02', 0, content.rindex(b'PK\x05\x06'))
    end = content.rindex(b'PK\x05\x06')
    entry = content[directory:end]
    more = b''.join(entry.replace(b'data/0', b'data/%d' % n) for n in range(1, 5))
    start, size = struct.unpack('<I', content[end + 16 : end + 20])[0], end + len(more)
    tail = struct.pack('<4s4H2IH', b'PK\x05\x06', 0, 0, 6, 6, size - start, start, 0)
    path.write_bytes(content[:end] + more + tail)
    with pytest.raises(CheckpointError, match='expected at most 4574 bytes in all entries'):
        Checkpoint(path)


def test_a_storage_of_another_length_than_promised_is_refused(tmp_path: Path) -> None:
    data = _tensor(b'K\x00', b'K\x04\x85', b'K\x01\x85')
    for content in ({}, {'data/0': bytes(15)}, {'data/0': bytes(17)}):
        path = _archive(tmp_path / 'a.ckpt', data, **content)
        with Checkpoint(path) as checkpoint, pytest.raises(CheckpointError, match=r'a\.ckpt'):
            checkpoint.tensor(checkpoint.data)


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        (None, 'got nothing'),
        (b'', 'zip checkpoint'),
        (pickle.dumps({'weights': 1}), 'zip checkpoint'),
    ],
)
def test_what_is_no_checkpoint_is_refused(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    path = tmp_path / 'a.ckpt'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        Checkpoint(path)


def test_another_byte_order_is_refused(tmp_path: Path) -> None:
    path = _archive(tmp_path / 'a.ckpt', b'\x80\x02N.', byteorder=b'big')
    with pytest.raises(CheckpointError, match="byte order: expected b'little', got b'big'"):
        Checkpoint(path)


def test_a_zip_without_a_checkpoint_in_it_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / 'a.ckpt', 'w') as archive:
        archive.writestr('readme', 'hello')
    with pytest.raises(CheckpointError, match=r'expected one data\.pkl, got 0'):
        Checkpoint(tmp_path / 'a.ckpt')


def test_a_configuration_that_unfolds_without_measure_is_refused() -> None:
    shared: list[object] = []
    for _ in range(40):
        shared = [shared] * 10
    data = pickle.dumps(shared, 2)
    assert len(data) < 2000
    with pytest.raises(CheckpointError, match='expected at most 100000 nodes, got more'):
        plain(RestrictedUnpickler(data).read())


def test_a_configuration_nested_without_end_is_refused() -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(CheckpointError, match='expected at most 64 levels, got more'):
        plain(RestrictedUnpickler(pickle.dumps(loop, 2)).read())


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 200))
def test_random_bytes_are_read_or_refused(noise: bytes, at: int) -> None:
    good = pickle.dumps({'a': [1, 2.5, 'x', None, (True, b'y')], 'b': {'c': -7}}, 2)
    for data in (noise, good[:at] + noise + good[at:], good[:at] + noise):
        try:
            RestrictedUnpickler(data).read()
        except CheckpointError as error:
            assert '\n' not in str(error)
