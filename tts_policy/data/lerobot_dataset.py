# SPDX-License-Identifier: Apache-2.0
"""Demonstrations in the data set format of LeRobot, versions 2 and 3.

A folder: `meta/info.json` says what there is, parquet files hold a row per frame, mp4 files the
images. In version 2 every episode has files of its own, in version 3 a file holds several. Parquet
is read by pyarrow, video by PyAV (OpenCV's wheels cannot decode AV1, the format's default); both
are optional.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from tts_policy.control.images import MAX_SIDE, ImageFit, encoded_size
from tts_policy.data.reader import BagError
from tts_policy.data.samples import ArraySamples, SampleSource, read_arrays
from tts_policy.policy.contract import PolicyContract

INFO = 'meta/info.json'
# What the columns of a stream are called unless it is said; a camera's is this and its key.
DEFAULT_STREAMS = {'joints': 'observation.state', 'commands': 'action'}
CAMERA_PREFIX = 'observation.images.'
MAX_FRAMES = 1 << 20


@dataclass(frozen=True)
class _Video:
    """Where the images of an episode begin."""

    file: Path
    start_s: float


@dataclass(frozen=True)
class _Episode:
    """One episode: its number and frames, its parquet file, and a video of every such camera."""

    index: int
    frames: int
    data: Path
    videos: dict[str, _Video]


def recognises(path: Path) -> bool:
    """Whether a path is the folder of such a data set."""
    return (path / INFO).is_file()


def episodes(
    path: Path, contract: PolicyContract, streams: Mapping[str, str], fit: ImageFit
) -> list[Callable[[], SampleSource]]:
    """Readers of all episodes.

    streams: columns of camera keys, joints and commands (empty for none), see `samples`.

    Raises
    ------
    BagError
        for a folder that is no such data set; the readers raise it for columns or files that are
        not there or damaged, or do not fit the contract.

    """
    dataset = LeRobotDataset(path)
    return [
        partial(_open_episode, dataset, episode, contract, streams, fit)
        for episode in dataset.episodes
    ]


def _open_episode(
    dataset: LeRobotDataset,
    episode: _Episode,
    contract: PolicyContract,
    streams: Mapping[str, str],
    fit: ImageFit,
) -> ArraySamples:
    cameras = {camera.key: CAMERA_PREFIX + camera.key for camera in contract.observation.cameras}
    return read_arrays(
        f'{dataset.root}: episode {episode.index}',
        contract,
        1.0 / dataset.fps,
        {**DEFAULT_STREAMS, **cameras, **streams},
        fit,
        partial(dataset.numbers, episode),
        partial(dataset.images, episode),
    )


def _package(name: str, where: Path) -> ModuleType:
    try:
        return __import__(name, fromlist=['_'])
    except ImportError:
        raise BagError(
            f'{where}: expected the package {name.partition(".")[0]}, got none: '
            "pip install 'tts_policy[datasets]'"
        ) from None


class LeRobotDataset:
    """What a data set says about itself, and the columns and images of its episodes."""

    def __init__(self, root: Path) -> None:
        """Read the descriptions; raises BagError."""
        self.root = root
        where = root / INFO
        try:
            info = json.loads(where.read_text())
            self._version = int(str(info['codebase_version']).lstrip('v').partition('.')[0])
            self.fps = float(info['fps'])
            self.features: dict[str, Any] = dict(info['features'])
            self._data_path = str(info['data_path'])
            self._video_path = str(info.get('video_path') or '')
            self._chunk_size = int(info.get('chunks_size') or 1000)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BagError(
                f'{where}: expected the description of a data set, got {error!r}'
            ) from None
        if self._version not in (2, 3) or not 0.1 <= self.fps <= 1000 or self._chunk_size < 1:
            raise BagError(
                f'{where}: expected version 2 or 3 with 0.1 to 1000 frames a second, '
                f'got {self._version} with {self.fps:g}'
            )
        self._video_keys = [
            key for key, about in self.features.items() if dict(about).get('dtype') == 'video'
        ]
        try:
            found = self._episodes_2() if self._version == 2 else self._episodes_3()
            self.episodes = sorted(found, key=lambda episode: episode.index)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, BagError):
                raise
            raise BagError(f'{root}: expected episodes, got {error!r}') from None
        if not self.episodes:
            raise BagError(f'{root}: expected at least one episode, got none')

    def _file(self, template: str, **numbers: Any) -> Path:
        """File that a template of the description names; it must lie in the data set."""
        path = self.root / template.format(**numbers)
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise BagError(f'{self.root}: expected a file inside of it, got {template!r}')
        return path

    def _episodes_2(self) -> list[_Episode]:
        listed = self.root / 'meta/episodes.jsonl'
        if not listed.is_file():
            raise BagError(f'{self.root}: expected file {listed.name!r}, got none')
        episodes = []
        for line in filter(str.strip, listed.read_text().splitlines()):
            row = json.loads(line)
            index = int(row['episode_index'])
            numbers = {'episode_chunk': index // self._chunk_size, 'episode_index': index}
            videos = {
                key: _Video(self._file(self._video_path, video_key=key, **numbers), 0.0)
                for key in self._video_keys
            }
            data = self._file(self._data_path, **numbers)
            episodes.append(_Episode(index, int(row['length']), data, videos))
        return episodes

    def _episodes_3(self) -> list[_Episode]:
        columns = ['episode_index', 'length', 'data/chunk_index', 'data/file_index']
        for key in self._video_keys:
            columns += [
                f'videos/{key}/{what}' for what in ('chunk_index', 'file_index', 'from_timestamp')
            ]
        episodes = []
        for file in sorted((self.root / 'meta/episodes').glob('*/*.parquet')):
            for row in self._table(file, columns).to_pylist():
                videos = {}
                for key in self._video_keys:
                    place = self._file(
                        self._video_path,
                        video_key=key,
                        chunk_index=row[f'videos/{key}/chunk_index'],
                        file_index=row[f'videos/{key}/file_index'],
                    )
                    videos[key] = _Video(place, float(row[f'videos/{key}/from_timestamp']))
                data = self._file(
                    self._data_path,
                    chunk_index=row['data/chunk_index'],
                    file_index=row['data/file_index'],
                )
                episodes.append(_Episode(row['episode_index'], row['length'], data, videos))
        return episodes

    def _table(self, file: Path, columns: list[str], episode: int | None = None) -> Any:
        parquet = _package('pyarrow.parquet', self.root)
        if not file.is_file():
            raise BagError(f'{self.root}: expected file {str(file)!r}, got none')
        rows = None if episode is None else [('episode_index', '=', episode)]
        try:
            return parquet.read_table(file, columns=columns, filters=rows)
        except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors are among these
            raise BagError(f'{file}: {" ".join(str(error).split())[:200]}') from None

    def _column(self, episode: _Episode, key: str) -> Any:
        if key not in self.features or key in self._video_keys:
            known = sorted(set(self.features) - set(self._video_keys))
            raise BagError(f'{self.root}: expected column {key!r}, got {known}')
        column = self._table(episode.data, [key], episode.index).column(0)
        if not len(column) == episode.frames <= MAX_FRAMES:
            raise BagError(
                f'{episode.data}: expected {episode.frames} frames of episode {episode.index}, '
                f'got {len(column)}'
            )
        return column

    def numbers(self, episode: _Episode, key: str) -> tuple[NDArray[np.float64], list[str]]:
        """Column of numbers or lists of them, [F, C], and the names of its components.

        Components without names are called KEY_0, KEY_1 and so on.
        """
        rows = self._column(episode, key).to_pylist()
        try:
            values = np.array(rows, np.float64).reshape(episode.frames, -1)
        except (ValueError, TypeError):
            raise BagError(
                f'{episode.data}: {key}: expected numbers in every frame, got others'
            ) from None
        names = self.features[key].get('names')
        if isinstance(names, dict):
            names = [n for group in names.values() if isinstance(group, list) for n in group]
        if not isinstance(names, list) or len(names) != values.shape[1]:
            names = [f'{key}_{i}' for i in range(values.shape[1])]
        return values, [str(name) for name in names]

    def images(self, episode: _Episode, key: str) -> Iterator[NDArray[np.uint8]]:
        """Frames uint8 [H, W, 3] of a camera, decoded one by one."""
        if key in self._video_keys:
            return self._video_frames(episode, episode.videos[key])
        if dict(self.features.get(key) or {}).get('dtype') != 'image':
            cameras = [k for k, f in self.features.items() if f.get('dtype') in ('image', 'video')]
            raise BagError(f'{self.root}: expected camera {key!r}, got {sorted(cameras)}')
        return self._stored_frames(episode, key)

    def _stored_frames(self, episode: _Episode, key: str) -> Iterator[NDArray[np.uint8]]:
        for value in self._column(episode, key):
            data = (value.as_py() or {}).get('bytes') or b''
            size = encoded_size(data)
            pixels = None
            if size is not None and max(size) <= MAX_SIDE:
                pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
            if pixels is None:
                raise BagError(
                    f'{episode.data}: {key}: expected a png or jpeg of at most {MAX_SIDE} pixels '
                    f'a side, got {len(data)} bytes'
                )
            yield cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)

    def _video_frames(self, episode: _Episode, video: _Video) -> Iterator[NDArray[np.uint8]]:
        av = _package('av', self.root)
        if not video.file.is_file():
            raise BagError(f'{self.root}: expected file {str(video.file)!r}, got none')
        seen = 0
        try:
            with av.open(str(video.file)) as container:
                stream = container.streams.video[0]
                if max(stream.height, stream.width) > MAX_SIDE:
                    raise BagError(
                        f'{video.file}: expected at most {MAX_SIDE} pixels a side, '
                        f'got {stream.height} x {stream.width}'
                    )
                container.seek(int(video.start_s / stream.time_base), stream=stream)
                for frame in container.decode(stream):
                    at = round((float(frame.pts * stream.time_base) - video.start_s) * self.fps)
                    # Decoding begins at the key frame before.
                    if at < seen:
                        continue
                    if at > seen or seen == episode.frames:
                        break
                    yield frame.to_ndarray(format='rgb24')
                    seen += 1
        except (av.FFmpegError, IndexError) as error:
            raise BagError(f'{video.file}: {" ".join(str(error).split())}') from None
        if seen < episode.frames:
            raise BagError(f'{video.file}: expected {episode.frames} frames, got {seen}')
