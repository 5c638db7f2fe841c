# SPDX-License-Identifier: Apache-2.0
"""Streaming access to rosbag2 recordings, one storage file at a time.

A recording is a folder with metadata.yaml (sqlite3 or mcap files, split or not, compressed by
file or by message), or a bare .mcap or .db3 file. rosbags reads the storage formats; here are the
order of the files, the limits on what compressed data may expand to, and the one-line reasons. A
missing file of a split recording is found when its turn comes: what stood before it was read.
"""

from __future__ import annotations

import heapq
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import yaml
from lz4.frame import LZ4FrameDecompressor
from rosbags.interfaces import Connection, QosDurability
from rosbags.rosbag2.storage_mcap import ChunkInfo, McapReader, msgsrc
from rosbags.rosbag2.storage_sqlite3 import Sqlite3Reader

from tts_policy.policy.yaml_file import read_yaml

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Storage = McapReader | Sqlite3Reader
_STORAGES: dict[str, type[Storage]] = {'mcap': McapReader, 'sqlite3': Sqlite3Reader}
# Decompression goes on piece by piece: a few kilobytes of zstd can hold gigabytes of zeros.
PIECE_BYTES = 1 << 20
_MCAP_MAGIC = b'\x89MCAP0\r\n'
_MCAP_FOOTER_BYTES = 37
_SUFFIXES = {'.mcap': 'mcap', '.db3': 'sqlite3'}


class BagError(ValueError):
    """A recording that cannot be used; one line naming the bag and the reason."""


@dataclass(frozen=True)
class BagLimits:
    """What compressed data may expand to, in bytes: a message or mcap chunk, and a whole file."""

    block: int = 256 << 20
    file: int = 64 << 30


@dataclass(frozen=True)
class RawMessage:
    """One message as it was recorded: CDR bytes, and the time at which it was received."""

    topic: str
    msgtype: str
    received_ns: int
    data: bytes


@dataclass(frozen=True)
class TopicSummary:
    """Type of a topic, how many messages the recording claims, and whether it was latched."""

    msgtype: str
    count: int
    latched: bool = False


def find_bags(paths: Sequence[Path]) -> list[Path]:
    """Bags among `paths` and one folder below each, sorted; raises BagError if there is none."""
    found = []
    for path in paths:
        if path.is_dir() and not (path / 'metadata.yaml').is_file():
            candidates = sorted(path.iterdir())
        else:
            candidates = [path]
        found += [
            c for c in candidates if (c / 'metadata.yaml').is_file() or c.suffix in _SUFFIXES
        ]
    if not found:
        raise BagError(f'{", ".join(map(str, paths))}: expected a rosbag2 recording, got none')
    return found


def _reason(error: Exception) -> str:
    """One line, whatever the library raised."""
    text = ' '.join(str(error).split()) or 'the data are damaged'
    return text if isinstance(error, BagError) else f'{text} ({type(error).__name__})'


class BagReader:
    """One recording. `topics`, `start_ns` and `definitions` are known without reading messages."""

    def __init__(self, path: Path, limits: BagLimits | None = None) -> None:
        """Read what the recording says about itself.

        Raises
        ------
        BagError
            if there is no recording, or its metadata or first file cannot be read.

        """
        self.path = path
        self.limits = limits or BagLimits()
        self.topics: dict[str, TopicSummary] = {}
        self.definitions: dict[str, Any] = {}
        self.duration_ns: int | None = None
        self._compression: str | None = None
        if path.is_dir():
            self._read_metadata()
        elif path.suffix in _SUFFIXES:
            self._files, self._kind = [path], _SUFFIXES[path.suffix]
        else:
            raise BagError(f'{path}: expected a folder with metadata.yaml, .mcap or .db3')
        with self._open(self._files[0]) as storage:
            self.start_ns = storage.metadata.start_time
            if self.duration_ns is None:
                self.duration_ns = storage.metadata.duration
            for connection in storage.connections:
                self.definitions[connection.msgtype] = connection.msgdef
                claimed = self.topics.get(connection.topic)
                if claimed is None and path.is_dir():
                    continue
                self.topics[connection.topic] = TopicSummary(
                    connection.msgtype,
                    connection.msgcount if claimed is None else claimed.count,
                    _is_latched(connection),
                )

    def _read_metadata(self) -> None:
        where = self.path / 'metadata.yaml'
        try:
            data = read_yaml(where)['rosbag2_bagfile_information']
            self._kind = str(data['storage_identifier'])
            mode = str(data.get('compression_mode') or 'none').lower()
            self._compression = None if mode == 'none' else mode
            scheme = data.get('compression_format')
            if self._compression is not None and scheme != 'zstd':
                raise BagError(f'expected compression format zstd, got {scheme!r}')
            # Old recordings name the bag's own folder before the file.
            self._files = [self.path / Path(str(p)).name for p in data['relative_file_paths']]
            self.duration_ns = int(data['duration']['nanoseconds'])
            for entry in data['topics_with_message_count']:
                topic = entry['topic_metadata']
                summary = TopicSummary(str(topic['type']), int(entry['message_count']))
                self.topics[str(topic['name'])] = summary
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            raise BagError(
                f'{where}: expected the metadata of a recording, got: {_reason(error)}'
            ) from None
        if self._kind not in _STORAGES:
            raise BagError(f'{where}: expected storage {list(_STORAGES)}, got {self._kind!r}')
        if not self._files:
            raise BagError(f'{where}: expected at least one storage file, got none')

    def messages(
        self, topics: Sequence[str] | None = None, start_ns: int | None = None
    ) -> Iterator[RawMessage]:
        """Messages of these topics (all, if None) in the order in which they were received.

        Raises
        ------
        BagError
            when a file is missing or damaged; what came before it is sound.

        """
        for file in self._files:
            with self._open(file) as storage:
                wanted = [c for c in storage.connections if topics is None or c.topic in topics]
                if wanted:
                    yield from self._stored(storage, wanted, start_ns, file)

    def _stored(
        self, storage: Storage, wanted: list[Connection], start_ns: int | None, file: Path
    ) -> Iterator[RawMessage]:
        if isinstance(storage, McapReader) and storage.chunks:
            source = _merged_chunks(storage, wanted, start_ns, self.limits)
        else:
            source = storage.messages(wanted, start_ns)
        while True:
            try:
                connection, received_ns, data = next(source)
                if self._compression == 'message':
                    data = decompress(data, self.limits.block, f'message of {connection.topic}')
            except StopIteration:
                return
            except Exception as error:  # noqa: BLE001 - damage shows as any exception of a parser
                raise BagError(f'{file}: {_reason(error)}') from None
            yield RawMessage(connection.topic, connection.msgtype, received_ns, data)

    @contextmanager
    def _open(self, file: Path) -> Iterator[Storage]:
        """Open one storage file, decompressed beside the system's temporary files if need be."""
        if not file.is_file():
            raise BagError(f'{self.path}: expected file {file.name!r}, got none')
        with TemporaryDirectory(prefix='bag_') as folder:
            try:
                plain = file
                if self._compression == 'file':
                    plain = Path(folder) / file.stem
                    with file.open('rb') as source, plain.open('wb') as target:
                        decompress_file(source, target, self.limits.file, file.name)
                if self._kind == 'mcap':
                    _check_mcap_end(plain)
                storage = _STORAGES[self._kind](plain)
                storage.open()
                _check_storage(storage)
            except Exception as error:  # noqa: BLE001 - damage shows as any exception of a parser
                raise BagError(f'{file}: {_reason(error)}') from None
            try:
                yield storage
            finally:
                storage.close()


def _is_latched(connection: Connection) -> bool:
    profiles = getattr(connection.ext, 'offered_qos_profiles', [])
    return any(profile.durability is QosDurability.TRANSIENT_LOCAL for profile in profiles)


def _check_storage(storage: Storage) -> None:
    formats = {getattr(c.ext, 'serialization_format', 'cdr') for c in storage.connections}
    if formats - {'cdr'}:
        raise BagError(f'expected messages serialised as cdr, got {sorted(formats)}')
    if isinstance(storage, McapReader) and not storage.chunks:
        statistics = storage.statistics
        if statistics is not None and statistics.chunk_count:
            raise BagError('expected an index of its chunks, got none: `mcap recover` writes one')


def _check_mcap_end(path: Path) -> None:
    """Refuse a file without a summary: rosbags would unpack all of it to make one."""
    with path.open('rb') as file:
        if path.stat().st_size < len(_MCAP_MAGIC) + _MCAP_FOOTER_BYTES:
            raise BagError('expected an mcap file, got too few bytes for one')
        if file.read(len(_MCAP_MAGIC)) != _MCAP_MAGIC:
            raise BagError('expected an mcap file, got another beginning')
        file.seek(-_MCAP_FOOTER_BYTES, os.SEEK_END)
        footer = file.read()
    summary_at = int.from_bytes(footer[9:17], 'little')
    if not footer.endswith(_MCAP_MAGIC) or summary_at == 0:
        raise BagError(
            'expected an mcap file with its summary at the end, got one cut off or never closed: '
            '`mcap recover` may help'
        )


def _merged_chunks(
    storage: McapReader, wanted: list[Connection], start_ns: int | None, limits: BagLimits
) -> Iterator[tuple[Connection, int, bytes]]:
    """Messages of indexed chunks by time; only chunks that overlap are in memory at once."""
    channels = {connection.id: connection for connection in wanted}
    chunks = [
        _bounded_chunk(storage, chunk, channels, start_ns, limits)
        for chunk in storage.chunks
        if (start_ns is None or start_ns <= chunk.message_end_time)
        and any(chunk.channel_count.get(channel, 0) for channel in channels)
    ]
    # Stable for equal times: chunks and messages stay in the order of the file.
    for received_ns, connection, data in heapq.merge(*chunks, key=itemgetter(0)):
        if connection is not None:
            yield connection, received_ns, data


def _bounded_chunk(
    storage: McapReader,
    chunk: ChunkInfo,
    channels: dict[int, Connection],
    start_ns: int | None,
    limits: BagLimits,
) -> Iterator[tuple[int, Connection | None, bytes]]:
    """First a place holder with the start of the chunk, so that merging opens chunks late."""
    yield chunk.message_start_time, None, b''
    what = f'chunk at byte {chunk.chunk_start_offset}'
    if chunk.uncompressed_size > limits.block:
        raise BagError(
            f'{what}: expected at most {limits.block} bytes when decompressed, '
            f'got {chunk.uncompressed_size}'
        )
    bio = storage.bio
    assert bio is not None
    if chunk.compression:
        bio.seek(chunk.chunk_start_offset + 9 + 40 + len(chunk.compression))
        data = bio.read(chunk.compressed_size)
        check_expansion(data, chunk.compression, chunk.uncompressed_size, what)
    first_ns = chunk.message_start_time if start_ns is None else start_ns
    for message in msgsrc(chunk, channels, first_ns, chunk.message_end_time + 1, bio):
        if message.connection is not None and message.data is not None:
            yield message.timestamp, message.connection, message.data


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
