# SPDX-License-Identifier: Apache-2.0
"""Data sets of other projects become the windows that a recording of the same motion gives."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from test_replay_buffer import put

from tts_policy.control.images import ImageFit
from tts_policy.data.demonstrations import find_demonstrations
from tts_policy.data.reader import BagError
from tts_policy.data.samples import Selection, parse_selections
from tts_policy.data.windows import Episode, Windows, read_episodes
from tts_policy.policy.bundle import load_bundle, save_random_bundle
from tts_policy.policy.contract import ActionSpec, CameraSpec, ObservationSpec, PolicyContract
from tts_policy.policy.network import NetworkSpec
from tts_policy.policy.pruner import Pruner
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.policy.schedulers.scheduler import SchedulerSpec
from tts_policy.train import train_pruner

FPS = 10
LENGTHS = (12, 9)
FRAMES = sum(LENGTHS)
CONTRACT = PolicyContract(
    ObservationSpec((CameraSpec('top', 32, 48),), ('x', 'y', 'grip'), steps=2, period_s=0.1),
    ActionSpec(('x', 'y'), horizon=6, execute=3, offset_steps=0),
)
BLIND = replace(CONTRACT, observation=replace(CONTRACT.observation, cameras=()))


def frame_numbers() -> NDArray[np.float64]:
    """A number for every frame of all episodes, [F]."""
    return np.arange(FRAMES, dtype=np.float64)


def states() -> NDArray[np.float64]:
    """x, y and grip of every frame."""
    return np.stack([frame_numbers(), 100 + frame_numbers(), 200 + frame_numbers()], 1)


def actions() -> NDArray[np.float64]:
    """Commanded x and y of every frame."""
    return states()[:, :2] + 0.5


def images(height: int = 32, width: int = 48) -> NDArray[np.uint8]:
    """Pictures of one grey each, 10 levels apart."""
    grey = (10 * frame_numbers()).astype(np.uint8)
    return np.broadcast_to(grey[:, None, None, None], (FRAMES, height, width, 3)).copy()


def write_buffer(path: Path, **arrays: NDArray[Any]) -> Path:
    """Replay buffer of these arrays, four frames a chunk."""
    with zipfile.ZipFile(path, 'w') as archive:
        put(archive, 'meta/episode_ends', np.cumsum(LENGTHS), (16,))
        for name, values in arrays.items():
            put(archive, f'data/{name}', values, (4, *values.shape[1:]))
    return path


def read(
    path: Path, contract: PolicyContract, fit: ImageFit = ImageFit.EXACT, **streams: str
) -> list[Episode]:
    found = find_demonstrations([path], contract, streams, fit)
    return [episode for one in found for episode in read_episodes(one.open())]


def assert_is_the_motion(episodes: list[Episode], cameras: bool = True) -> None:
    """Windows of two frames; actions of the older one on, the last one held."""
    assert [len(episode) for episode in episodes] == [n - 1 for n in LENGTHS]
    start = 0
    for episode, length in zip(episodes, LENGTHS, strict=True):
        older = start + np.arange(length - 1)
        np.testing.assert_array_equal(episode.joints[:, 0], states()[older])
        np.testing.assert_array_equal(episode.joints[:, 1], states()[older + 1])
        ahead = np.minimum(older[:, None] + np.arange(6), start + length - 1)
        np.testing.assert_array_equal(episode.actions, actions()[ahead])
        if cameras:
            shown = episode.images['top'][episode.image_index['top']].mean((2, 3, 4))
            np.testing.assert_allclose(shown, 10 * (older[:, None] + np.arange(2)), atol=3)
        start += length


def test_a_replay_buffer_gives_the_windows_of_its_episodes(tmp_path: Path) -> None:
    path = write_buffer(
        tmp_path / 'demos.zarr.zip',
        agent=states()[:, :2],
        grip=states()[:, 2:],
        action=actions(),
        img=images().astype(np.float32),
    )
    assert_is_the_motion(read(path, CONTRACT, joints='agent,grip', top='img'))
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / 'demos.zarr')
    assert_is_the_motion(read(tmp_path / 'demos.zarr', BLIND, joints='agent,grip'), cameras=False)


def test_images_of_a_data_set_are_brought_to_the_contracts_size(tmp_path: Path) -> None:
    path = write_buffer(
        tmp_path / 'demos.zarr.zip', state=states(), action=actions(), top=images(64, 64)
    )
    with pytest.raises(BagError, match=r'episode 0: top: expected an image of 32 x 48 .*64 x 64'):
        read(path, CONTRACT)
    assert_is_the_motion(read(path, CONTRACT, ImageFit.CROP))


def test_columns_are_chosen_by_range_and_taken_by_name(tmp_path: Path) -> None:
    """The names of a converted checkpoint are those of its arrays, numbered."""
    mixed = np.concatenate([states()[:, ::-1], states()], 1)
    path = write_buffer(tmp_path / 'demos.zarr.zip', state=mixed, action=actions())
    assert_is_the_motion(read(path, BLIND, joints='state[3:]'), cameras=False)
    named = replace(
        BLIND, observation=replace(BLIND.observation, joints=('state_2', 'state_1', 'state_0'))
    )
    assert_is_the_motion(read(path, named), cameras=False)
    assert parse_selections('a[:2],b') == [
        Selection('a', slice(None, 2)),
        Selection('b', slice(None, None)),
    ]


def test_without_actions_the_states_that_followed_are_the_actions(tmp_path: Path) -> None:
    path = write_buffer(tmp_path / 'demos.zarr.zip', state=states())
    episode = read(path, BLIND, commands='')[0]
    np.testing.assert_allclose(episode.actions[3, :4], states()[4:8, :2], atol=1e-6)


@pytest.mark.fault
@pytest.mark.parametrize(
    ('streams', 'reason'),
    [
        ({'joints': 'state[:2]'}, r"joints: expected 3 columns \['x', 'y', 'grip'\], got 2"),
        ({'joints': 'state]'}, r"expected arrays such as keypoint,state\[:2\], got 'state\]'"),
        ({'joints': 'nothing'}, 'data/nothing: expected a zarr v2 array'),
        ({'commands': ''}, 'not a data set of this contract'),
        ({'wrist': 'img'}, r"topics: expected .*, got \['wrist'\]"),
    ],
)
def test_streams_that_do_not_fit_are_refused(
    tmp_path: Path, streams: dict[str, str], reason: str
) -> None:
    contract = BLIND
    if reason.startswith('not'):
        contract = replace(BLIND, action=replace(BLIND.action, joints=('x', 'lift')))
        reason = r"episode 0: expected commands, got none, and \['lift'\] are not observed"
    path = write_buffer(tmp_path / 'demos.zarr.zip', state=states(), action=actions())
    with pytest.raises(BagError, match=reason) as error:
        read(path, contract, **streams)
    assert '\n' not in str(error.value)


@pytest.mark.fault
def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    bad = states()
    bad[3, 1] = np.nan
    path = write_buffer(tmp_path / 'demos.zarr.zip', state=bad, action=actions())
    with pytest.raises(BagError, match='episode 0: joints: expected finite numbers, got nan'):
        read(path, BLIND)


# LeRobot


def info(version: str, camera: str, **changes: Any) -> dict[str, Any]:
    """Description of a data set, as LeRobot writes it."""
    two = version.startswith('v2')
    place = 'chunk-{chunk_index:03d}/file-{file_index:03d}'
    old = 'chunk-{episode_chunk:03d}'
    state = {'dtype': 'float32', 'shape': [3], 'names': {'motors': ['grip', 'x', 'y']}}
    return {
        'codebase_version': version,
        'fps': FPS,
        'chunks_size': 1000,
        'data_path': f'data/{old}/episode_{{episode_index:06d}}.parquet'
        if two
        else f'data/{place}.parquet',
        'video_path': f'videos/{old}/{{video_key}}/episode_{{episode_index:06d}}.mp4'
        if two
        else f'videos/{{video_key}}/{place}.mp4',
        'features': {
            'observation.state': state,
            'action': {'dtype': 'float32', 'shape': [2], 'names': None},
            'observation.images.top': {'dtype': camera, 'shape': [32, 48, 3]},
        },
        **changes,
    }


def write_video(path: Path, frames: NDArray[np.uint8], codec: str) -> None:
    """Video of these frames, with key frames that do not fall on the episodes."""
    av = pytest.importorskip('av', reason='PyAV is not installed')
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=FPS, options={'g': '5'})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], 'yuv420p'
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format='rgb24')))
        container.mux(stream.encode())


def write_lerobot(root: Path, version: str, camera: str = 'video', codec: str = 'libx264') -> Path:
    """Write the motion as a LeRobot data set."""
    arrow = pytest.importorskip('pyarrow', reason='pyarrow is not installed')
    from pyarrow import parquet

    def put_table(path: Path, columns: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(arrow.table(columns), path)

    (root / 'meta').mkdir(parents=True)
    (root / 'meta/info.json').write_text(json.dumps(info(version, camera)))
    episode_of = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    ends = np.cumsum(LENGTHS)
    columns: dict[str, Any] = {
        'observation.state': list(states()[:, [2, 0, 1]].astype(np.float32)),
        'action': list(actions().astype(np.float32)),
        'episode_index': episode_of,
    }
    if camera == 'image':
        encoded = [cv2.imencode('.png', picture)[1].tobytes() for picture in images()]
        columns['observation.images.top'] = [{'bytes': data, 'path': ''} for data in encoded]
    video_key = 'observation.images.top'
    if version.startswith('v2'):
        lines = []
        for index, end in enumerate(ends):
            rows = slice(end - LENGTHS[index], end)
            file = root / f'data/chunk-000/episode_{index:06d}.parquet'
            put_table(file, {name: values[rows] for name, values in columns.items()})
            lines.append(json.dumps({'episode_index': index, 'length': LENGTHS[index]}))
            if camera == 'video':
                file = root / f'videos/chunk-000/{video_key}/episode_{index:06d}.mp4'
                write_video(file, images()[rows], codec)
        (root / 'meta/episodes.jsonl').write_text('\n'.join(lines) + '\n')
        return root
    put_table(root / 'data/chunk-000/file-000.parquet', columns)
    described: dict[str, Any] = {
        'episode_index': [0, 1],
        'length': list(LENGTHS),
        'data/chunk_index': [0, 0],
        'data/file_index': [0, 0],
    }
    if camera == 'video':
        described |= {
            f'videos/{video_key}/chunk_index': [0, 0],
            f'videos/{video_key}/file_index': [0, 0],
            f'videos/{video_key}/from_timestamp': [0.0, LENGTHS[0] / FPS],
        }
        write_video(root / f'videos/{video_key}/chunk-000/file-000.mp4', images(), codec)
    put_table(root / 'meta/episodes/chunk-000/file-000.parquet', described)
    return root


@pytest.mark.parametrize('version', ['v2.1', 'v3.0'])
@pytest.mark.parametrize('codec', ['libx264', 'libsvtav1'])
def test_a_lerobot_data_set_gives_the_windows_of_its_episodes(
    tmp_path: Path, version: str, codec: str
) -> None:
    path = write_lerobot(tmp_path / 'set', version, codec=codec)
    assert_is_the_motion(read(path, CONTRACT))


@pytest.mark.parametrize('version', ['v2.0', 'v3.0'])
def test_images_may_lie_in_the_parquet_files(tmp_path: Path, version: str) -> None:
    path = write_lerobot(tmp_path / 'set', version, camera='image')
    assert_is_the_motion(read(path, CONTRACT))
    assert_is_the_motion(read(path, BLIND), cameras=False)


def test_a_data_set_that_is_faster_than_the_policy_gives_a_window_a_period(
    tmp_path: Path,
) -> None:
    path = write_lerobot(tmp_path / 'set', 'v3.0', camera='image')
    slow = replace(BLIND, observation=replace(BLIND.observation, period_s=0.2))
    episode = read(path, slow)[0]
    assert np.diff(episode.joints[:, :, 0]).ravel().tolist() == [2.0] * len(episode)
    fast = replace(BLIND, observation=replace(BLIND.observation, period_s=0.02))
    with pytest.raises(BagError, match='expected windows, got none'):
        read(path, fast)


def change_info(root: Path, **changes: Any) -> None:
    described = json.loads((root / 'meta/info.json').read_text())
    (root / 'meta/info.json').write_text(json.dumps({**described, **changes}))


@pytest.mark.fault
@pytest.mark.parametrize(
    ('changes', 'reason'),
    [
        ({'codebase_version': 'v1.6'}, 'expected version 2 or 3 with .*, got 1'),
        ({'fps': 0}, 'expected version 2 or 3 with 0.1 to 1000 frames a second'),
        ({'fps': None}, 'expected the description of a data set'),
        ({'features': []}, r"expected column 'observation.state', got \[\]"),
        ({'data_path': '../{chunk_index}.parquet'}, 'expected a file inside of it'),
        ({'data_path': 'data/{nothing}.parquet'}, 'expected episodes, got KeyError'),
        ({'data_path': 'data/other.parquet'}, r"expected file '.*other.parquet', got none"),
        ({'data_path': 'meta/info.json'}, 'info.json: '),
    ],
)
def test_a_data_set_that_is_damaged_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    path = write_lerobot(tmp_path / 'set', 'v3.0', camera='image')
    change_info(path, **changes)
    with pytest.raises(BagError, match=reason) as error:
        read(path, BLIND)
    assert '\n' not in str(error.value)


@pytest.mark.fault
def test_a_video_that_is_short_or_missing_is_refused(tmp_path: Path) -> None:
    path = write_lerobot(tmp_path / 'set', 'v2.1')
    video = path / 'videos/chunk-000/observation.images.top/episode_000001.mp4'
    write_video(video, images()[:5], 'libx264')
    with pytest.raises(BagError, match=r'episode_000001.mp4: expected 9 frames, got 5'):
        read(path, CONTRACT)
    video.write_bytes(b'no video')
    with pytest.raises(BagError, match=r'episode_000001.mp4: .*Invalid data'):
        read(path, CONTRACT)
    video.unlink()
    with pytest.raises(BagError, match=r"expected file '.*mp4', got none"):
        read(path, CONTRACT)


def test_episodes_of_every_sort_are_held_in_one_set_of_windows(tmp_path: Path) -> None:
    path = write_buffer(tmp_path / 'demos.zarr.zip', state=states(), action=actions())
    assert len(Windows(read(path, BLIND), BLIND)) == FRAMES - 2


def test_a_pruner_is_trained_from_a_replay_buffer_and_a_recordings_command_line(
    tmp_path: Path,
) -> None:
    bundle, out = tmp_path / 'bundle', tmp_path / 'out'
    samplers = {'ddim10': SamplerSpec(SchedulerSpec('ddim', 10))}
    save_random_bundle(bundle, BLIND, samplers, NetworkSpec(width=32, layers=2, heads=2), seed=0)
    path = write_buffer(tmp_path / 'demos.zarr.zip', pose=states(), action=actions())
    options = ['--sampler', 'ddim10', '--sparsities', '0.8', '--out', str(out), '--held-out', '1']
    options += ['--steps', '1', '--batch', '2', '--sample', '1', '--trials', '2', '--ticks', '2']
    command = [str(path), str(path), '--bundle', str(bundle), *options]
    assert train_pruner.main([*command, '--topic', 'joints:=pose', '--episodes', '4']) == 0
    pruner = load_bundle(bundle).sampler('ddim10')[1]
    assert isinstance(pruner, Pruner) and pruner.spec.sparsities == (0.8,)


@pytest.mark.fault
def test_commands_of_training_say_what_is_wrong_with_a_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / 'bundle'
    samplers = {'ddim10': SamplerSpec(SchedulerSpec('ddim', 10))}
    save_random_bundle(bundle, BLIND, samplers, NetworkSpec(width=32, layers=2, heads=2), seed=0)
    path = write_buffer(tmp_path / 'demos.zarr.zip', state=states(), action=actions())
    command = [str(path), '--bundle', str(bundle), '--sampler', 'ddim10', '--out', str(tmp_path)]
    for option, reason in (
        (['--held-out', '2'], 'got 2 of 2'),
        (['--held-out', '1', '--topic', 'joints:=pose'], 'data/pose: expected a zarr v2 array'),
    ):
        assert train_pruner.main([*command, '--sparsities', '0.8', *option]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith('train_pruner: ') and reason in error
