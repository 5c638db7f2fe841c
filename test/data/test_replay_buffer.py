# SPDX-License-Identifier: Apache-2.0
"""Replay buffers of Diffusion Policy, written here chunk by chunk as zarr v2 lays them out."""

from __future__ import annotations

import itertools
import json
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from tts_policy.data.replay_buffer import ReplayBufferError, load_replay_buffer

numcodecs = pytest.importorskip('numcodecs', reason='numcodecs is not installed')
pytest.importorskip('zarr', reason='zarr is not installed')

ENDS = np.array([4, 9])


def put(
    archive: zipfile.ZipFile,
    name: str,
    values: NDArray[Any],
    chunk_shape: tuple[int, ...],
    compressor: dict[str, Any] | None = None,
    encode: Callable[[bytes], bytes] = bytes,
    leave_out: tuple[int, ...] | None = None,
    **changes: Any,
) -> None:
    """Write an array; edge chunks are whole, as zarr writes them."""
    about = {
        'zarr_format': 2,
        'shape': values.shape,
        'chunks': chunk_shape,
        'dtype': values.dtype.str,
        'compressor': compressor,
        'fill_value': 0,
        'filters': None,
        'order': 'C',
    }
    archive.writestr(f'{name}/.zarray', json.dumps({**about, **changes}))
    grid = [range(-(-n // c)) for n, c in zip(values.shape, chunk_shape, strict=True)]
    for index in itertools.product(*grid):
        chunk = np.zeros(chunk_shape, values.dtype)
        part = values[
            tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunk_shape, strict=True))
        ]
        chunk[tuple(slice(0, n) for n in part.shape)] = part
        raw = encode(chunk.tobytes())
        if index != leave_out:
            archive.writestr(f'{name}/{".".join(map(str, index))}', raw)


@pytest.fixture
def arrays() -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    return {
        'img': rng.integers(0, 256, (9, 5, 4, 3)).astype(np.float32),
        'action': rng.standard_normal((9, 2)).astype(np.float32),
    }


def write(path: Path, arrays: dict[str, NDArray[Any]], **changes: Any) -> Path:
    with zipfile.ZipFile(path, 'w') as archive:
        put(archive, 'meta/episode_ends', ENDS, (16,))
        put(archive, 'data/img', arrays['img'], (4, 5, 3, 3))
        put(archive, 'data/action', arrays['action'], (4, 2), **changes)
    return path


def test_arrays_come_back_whole_and_split_into_episodes(
    tmp_path: Path, arrays: dict[str, NDArray[Any]]
) -> None:
    file = write(tmp_path / 'demos.zarr.zip', arrays)
    buffer = load_replay_buffer(file, ('img', 'action'), {'img': np.uint8})
    assert buffer.data['img'].dtype == np.uint8
    assert np.array_equal(buffer.data['img'], arrays['img'])
    assert np.array_equal(buffer.data['action'], arrays['action'])
    assert [len(episode['action']) for episode in buffer] == [4, 5]
    assert np.array_equal(buffer.episode(1)['img'], arrays['img'][4:])


def test_only_what_is_asked_for_is_read(tmp_path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    file = write(tmp_path / 'demos.zarr.zip', arrays)
    assert list(load_replay_buffer(file, ('action',)).data) == ['action']


def test_a_chunk_that_was_never_written_is_the_fill_value(
    tmp_path: Path, arrays: dict[str, NDArray[Any]]
) -> None:
    file = write(tmp_path / 'demos.zarr.zip', arrays, leave_out=(1, 0), fill_value=7.0)
    action = load_replay_buffer(file, ('action',)).data['action']
    assert (action[4:8] == 7.0).all()
    assert np.array_equal(action[8:], arrays['action'][8:])


@pytest.mark.parametrize('codec', ['zlib', 'blosc'])
def test_compressed_chunks_are_read(
    codec: str, tmp_path: Path, arrays: dict[str, NDArray[Any]]
) -> None:
    blosc = numcodecs.Blosc(cname='zstd', clevel=5, shuffle=2)
    encoder = {'zlib': numcodecs.Zlib(), 'blosc': blosc}[codec]
    file = write(
        tmp_path / 'demos.zarr.zip',
        arrays,
        compressor=encoder.get_config(),
        encode=lambda raw: bytes(encoder.encode(raw)),
    )
    assert np.array_equal(load_replay_buffer(file, ('action',)).data['action'], arrays['action'])


class _Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self._file,)


@pytest.mark.fault
def test_a_chunk_is_never_unpickled(tmp_path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    sprung = tmp_path / 'sprung'
    file = write(
        tmp_path / 'demos.zarr.zip',
        arrays,
        compressor={'id': 'pickle'},
        encode=lambda _: pickle.dumps(_Trap(sprung)),
    )
    with pytest.raises(ReplayBufferError, match=r"a compressor of \['blosc', .* got 'pickle'"):
        load_replay_buffer(file, ('action',))
    assert not sprung.exists()


@pytest.mark.fault
@pytest.mark.parametrize('codec', ['zlib', 'gzip', 'bz2', 'lzma', 'zstd', 'lz4', 'blosc'])
@pytest.mark.parametrize(
    'junk',
    [b'', b'junk', b'\0' * 40, b'\xff' * 40],
    ids=['nothing', 'text', 'zeros', 'ones'],
)
def test_chunks_that_do_not_decompress_are_refused(
    codec: str, junk: bytes, tmp_path: Path, arrays: dict[str, NDArray[Any]]
) -> None:
    compressor, file = {'id': codec}, tmp_path / 'demos.zarr.zip'
    write(file, arrays, compressor=compressor, encode=lambda _: junk)
    with pytest.raises(ReplayBufferError) as error:
        load_replay_buffer(file, ('action',))
    assert 'chunk data/action/0.0' in str(error.value) and '\n' not in str(error.value)


@pytest.mark.fault
@pytest.mark.parametrize('codec', ['zlib', 'gzip', 'bz2', 'lzma'])
def test_chunks_that_are_cut_short_are_refused(
    codec: str, tmp_path: Path, arrays: dict[str, NDArray[Any]]
) -> None:
    encoder, file = numcodecs.get_codec({'id': codec}), tmp_path / 'demos.zarr.zip'
    compressor = encoder.get_config()
    write(file, arrays, compressor=compressor, encode=lambda raw: bytes(encoder.encode(raw))[:-9])
    with pytest.raises(ReplayBufferError, match='chunk data/action'):
        load_replay_buffer(file, ('action',))


JPEG2K = {'id': 'imagecodecs_jpeg2k', 'level': 50}


def jpeg2k(raw: bytes, shape: tuple[int, int] = (40, 48)) -> bytes:
    """Encode an RGB image without loss."""
    image = np.frombuffer(raw, np.uint8).reshape(*shape, 3)[..., ::-1]
    options = [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000]
    return cv2.imencode('.jp2', image, options)[1].tobytes()


def write_images(path: Path, images: NDArray[np.uint8], encode: Callable[[bytes], bytes]) -> Path:
    with zipfile.ZipFile(path, 'w') as archive:
        put(archive, 'meta/episode_ends', ENDS, (16,))
        put(archive, 'data/img', images, (1, *images.shape[1:]), JPEG2K, encode)
    return path


@pytest.fixture
def images() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (9, 40, 48, 3), dtype=np.uint8)


def test_images_in_jpeg_2000_are_read(tmp_path: Path, images: NDArray[np.uint8]) -> None:
    file = write_images(tmp_path / 'demos.zarr.zip', images, jpeg2k)
    assert np.array_equal(load_replay_buffer(file, ('img',)).data['img'], images)


@pytest.mark.parametrize(
    ('encode', 'reason'),
    [
        (lambda raw: raw, 'expected an image in JPEG 2000'),
        (lambda raw: jpeg2k(raw)[:90], 'chunk data/img/0.0.0.0: '),
        (lambda raw: jpeg2k(raw, (48, 40)), 'expected an image of 40 x 48, got one of 48 x 40'),
    ],
)
def test_images_that_are_none_are_refused(
    tmp_path: Path,
    images: NDArray[np.uint8],
    encode: Callable[[bytes], bytes],
    reason: str,
) -> None:
    file = write_images(tmp_path / 'demos.zarr.zip', images, encode)
    with pytest.raises(ReplayBufferError, match=reason):
        load_replay_buffer(file, ('img',))


@pytest.mark.fault
@pytest.mark.parametrize('codec', ['zlib', 'gzip', 'bz2', 'lzma', 'zstd', 'lz4', 'blosc'])
def test_a_chunk_that_expands_beyond_its_array_is_refused_before_it_is_decoded(
    codec: str, tmp_path: Path, arrays: dict[str, NDArray[Any]]
) -> None:
    encoder, file = numcodecs.get_codec({'id': codec}), tmp_path / 'demos.zarr.zip'
    bomb = bytes(encoder.encode(bytes(64 << 20)))
    write(file, arrays, compressor=encoder.get_config(), encode=lambda _: bomb)
    tracemalloc.start()
    with pytest.raises(ReplayBufferError, match=r'chunk data/action/0.0: .*expected'):
        load_replay_buffer(file, ('action',))
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


@pytest.mark.fault
def test_a_zip_entry_that_expands_is_refused(
    tmp_path: Path, arrays: dict[str, NDArray[Any]]
) -> None:
    file = write(tmp_path / 'demos.zarr.zip', arrays)
    with zipfile.ZipFile(file, 'a', zipfile.ZIP_LZMA) as archive:
        put(archive, 'data/extra', arrays['action'], (4, 2))
    with pytest.raises(ReplayBufferError, match='expected a stored or deflated zip entry'):
        load_replay_buffer(file, ('extra',))


@pytest.mark.parametrize(
    ('changes', 'reason'),
    [
        ({'zarr_format': 3}, 'expected zarr_format 2, order C and no filters, got 3'),
        ({'order': 'F'}, 'got 2, F and None'),
        ({'filters': [{'id': 'delta'}]}, 'no filters, got 2, C and [{'),
        ({'dtype': '|O'}, 'expected numbers, got object'),
        ({'dtype': 'nonsense'}, 'expected a zarr v2 array'),
        ({'dtype': '<f8'}, 'expected 64 bytes, got 32'),
        ({'shape': [8, 2]}, 'expected 9 frames, got shape'),
        ({'shape': [9, 10**12]}, 'expected at most 8589934592 bytes'),
        ({'chunks': [4]}, 'expected a chunk size for every axis, got (4,) of (9, 2)'),
        ({'chunks': [4, 0]}, 'expected a chunk size for every axis, got (4, 0) of (9, 2)'),
        ({'chunks': [10**6, 10**6]}, 'expected chunks of at most 1073741824 bytes'),
        ({'dtype': '<i4', 'fill_value': 'NaN'}, "expected a fill value of int32, got 'NaN'"),
        ({'dtype': '<i4', 'fill_value': float('nan')}, 'expected a fill value of int32, got nan'),
        ({'fill_value': [1, 2]}, 'expected a fill value of float32, got [1, 2]'),
    ],
)
def test_an_array_that_is_not_what_it_should_be_is_refused_with_the_reason(
    changes: dict[str, Any], reason: str, tmp_path: Path, arrays: dict[str, NDArray[Any]]
) -> None:
    file = write(tmp_path / 'demos.zarr.zip', arrays, **changes)
    with pytest.raises(ReplayBufferError) as error:
        load_replay_buffer(file, ('action',))
    assert reason in str(error.value)
    assert str(file) in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('dtype', 'bad'),
    [(np.float32, 256), (np.float32, -1), (np.float32, np.nan), (np.int64, 256), (np.int64, -1)],
)
def test_values_beyond_a_byte_are_refused_as_images(
    dtype: type, bad: float, tmp_path: Path, arrays: dict[str, NDArray[Any]]
) -> None:
    arrays['img'] = arrays['img'].astype(dtype)
    arrays['img'][6, 0, 0, 0] = bad
    file = write(tmp_path / 'demos.zarr.zip', arrays)
    with pytest.raises(ReplayBufferError, match=r'expected values in \[0, 255\] for uint8'):
        load_replay_buffer(file, ('img',), {'img': np.uint8})


def test_a_fill_value_beyond_a_byte_is_refused_where_it_is_read(
    tmp_path: Path, arrays: dict[str, NDArray[Any]]
) -> None:
    stored_as = {'action': np.uint8}
    arrays['action'] = np.ones((9, 2), np.float32)
    file = write(tmp_path / 'demos.zarr.zip', arrays, fill_value='NaN')
    assert (load_replay_buffer(file, ('action',), stored_as).data['action'] == 1).all()
    file = write(tmp_path / 'demos.zarr.zip', arrays, fill_value='NaN', leave_out=(1, 0))
    with pytest.raises(ReplayBufferError, match=r'expected values in \[0, 255\] for uint8'):
        load_replay_buffer(file, ('action',), stored_as)


@pytest.mark.parametrize('ends', [[4, 4], [], [0, 9]])
def test_episodes_that_do_not_end_one_after_another_are_refused(
    ends: list[int], tmp_path: Path
) -> None:
    file = tmp_path / 'demos.zarr.zip'
    with zipfile.ZipFile(file, 'w') as archive:
        put(archive, 'meta/episode_ends', np.array(ends, np.int64), (16,))
    with pytest.raises(ReplayBufferError, match='episode_ends: expected numbers that rise'):
        load_replay_buffer(file, ())


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / 'text.zip').write_text('not a zip file')
    for name in ('text.zip', 'absent.zip'):
        with pytest.raises(ReplayBufferError, match=f'{name}: expected a zip file'):
            load_replay_buffer(tmp_path / name, ())
    with zipfile.ZipFile(tmp_path / 'empty.zip', 'w'):
        pass
    with pytest.raises(ReplayBufferError, match='meta/episode_ends: expected a zarr v2 array'):
        load_replay_buffer(tmp_path / 'empty.zip', ())
