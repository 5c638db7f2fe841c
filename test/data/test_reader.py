# SPDX-License-Identifier: Apache-2.0
"""Every form of a recording gives the same messages, and damage gives one line."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest
from recordings import Recording, add_file, make_chunk_bomb, storage_file

from tts_policy.data.reader import BagError, BagLimits, BagReader, RawMessage, find_bags

RECORDING = Recording(frames=6)
FORMS = [
    ('mcap', 'none'),
    ('mcap', 'storage'),
    ('mcap', 'file'),
    ('mcap', 'message'),
    ('sqlite3', 'none'),
    ('sqlite3', 'file'),
    ('sqlite3', 'message'),
]


def write(path: Path, storage: str, compression: str) -> Path:
    recording = Recording(frames=6, storage=storage, compression=compression)
    return recording.write(path)


def read(path: Path, **limits: int) -> list[RawMessage]:
    return list(BagReader(path, BagLimits(**limits)).messages())


@pytest.mark.parametrize(('storage', 'compression'), FORMS)
def test_every_form_gives_the_same_messages(
    tmp_path: Path, storage: str, compression: str
) -> None:
    plain = read(RECORDING.write(tmp_path / 'plain'))
    assert len(plain) == 6 * (5 + 1 + 1)
    assert read(write(tmp_path / 'bag', storage, compression)) == plain


@pytest.mark.parametrize('storage', ['mcap', 'sqlite3'])
def test_a_bare_file_is_a_recording(tmp_path: Path, storage: str) -> None:
    bag = write(tmp_path / 'bag', storage, 'none')
    bare = shutil.copy(storage_file(bag), tmp_path)
    assert read(Path(bare)) == read(bag)
    assert BagReader(Path(bare)).topics == BagReader(bag).topics


def test_split_files_are_read_one_after_another(tmp_path: Path) -> None:
    bag, other = (RECORDING.write(tmp_path / name) for name in ('bag', 'other'))
    one = read(bag)
    add_file(bag, other)
    assert read(bag) == one + one


def test_only_the_topics_asked_for_are_read(tmp_path: Path) -> None:
    bag = RECORDING.write(tmp_path / 'bag')
    topics = {message.topic for message in BagReader(bag).messages(['/camera/image'])}
    assert topics == {'/camera/image'}


@pytest.mark.fault
def test_what_stands_before_a_missing_file_is_read(tmp_path: Path) -> None:
    bag, other = (RECORDING.write(tmp_path / name) for name in ('bag', 'other'))
    whole = read(bag)
    add_file(bag, other)
    (bag / 'second.mcap').unlink()
    reader, got = BagReader(bag).messages(), []
    with pytest.raises(BagError, match=r"bag: expected file 'second.mcap', got none"):
        while True:
            got.append(next(reader))
    assert got == whole


@pytest.mark.fault
@pytest.mark.parametrize('share', [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_mcap_says_so(tmp_path: Path, share: float) -> None:
    bag = RECORDING.write(tmp_path / 'bag')
    path = storage_file(bag)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(BagError, match=r'bag.mcap: expected an mcap file') as caught:
        read(bag)
    assert '\n' not in str(caught.value)


@pytest.mark.fault
@pytest.mark.parametrize('storage', ['mcap', 'sqlite3'])
@pytest.mark.parametrize('compression', ['none', 'storage', 'file', 'message'])
def test_flipped_bytes_give_messages_or_one_line(
    tmp_path: Path, storage: str, compression: str
) -> None:
    if storage == 'sqlite3' and compression == 'storage':
        pytest.skip('sqlite3 has no compression of its own')
    bag = write(tmp_path / 'bag', storage, compression)
    path = storage_file(bag)
    data = path.read_bytes()
    refused = 0
    for at in range(0, len(data), max(1, len(data) // 60)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        try:
            read(bag)
        except BagError as error:
            refused += 1
            assert '\n' not in str(error)
    assert refused


@pytest.mark.fault
@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        ('', 'expected the metadata of a recording'),
        ('[1, 2', 'expected the metadata of a recording'),
        ('rosbag2_bagfile_information: {}', 'expected the metadata of a recording'),
        ('- &a [*a]', 'expected the metadata of a recording'),
    ],
)
def test_metadata_that_are_none_are_refused(tmp_path: Path, content: str, reason: str) -> None:
    bag = RECORDING.write(tmp_path / 'bag')
    (bag / 'metadata.yaml').write_text(content)
    with pytest.raises(BagError, match=reason):
        BagReader(bag)


@pytest.mark.fault
def test_a_database_that_is_no_bag_is_refused(tmp_path: Path) -> None:
    path = tmp_path / 'phone.db3'
    with sqlite3.connect(path) as database:
        database.execute('CREATE TABLE numbers (name TEXT)')
    with pytest.raises(BagError, match=r'phone\.db3: .*missing tables'):
        BagReader(path)
    path.write_bytes(b'no database at all' * 100)
    with pytest.raises(BagError, match=r'phone\.db3: .*database'):
        BagReader(path)


@pytest.mark.fault
@pytest.mark.parametrize(
    ('storage', 'compression', 'limits'),
    [
        ('mcap', 'storage', {'block': 1000}),
        ('mcap', 'message', {'block': 1000}),
        ('sqlite3', 'message', {'block': 1000}),
        ('mcap', 'file', {'file': 1000}),
    ],
)
def test_data_that_expand_beyond_the_limit_are_refused(
    tmp_path: Path, storage: str, compression: str, limits: dict[str, int]
) -> None:
    bag = write(tmp_path / 'bag', storage, compression)
    with pytest.raises(BagError, match='expected at most 1000 bytes'):
        read(bag, **limits)


@pytest.mark.fault
def test_a_chunk_that_holds_more_than_it_says_is_refused_before_it_is_unpacked(
    tmp_path: Path,
) -> None:
    bag = write(tmp_path / 'bag', 'mcap', 'storage')
    promised = make_chunk_bomb(bag)
    with pytest.raises(BagError, match=rf'expected at most {promised} bytes'):
        read(bag)


def test_bags_are_found_once_in_folders(tmp_path: Path) -> None:
    bags = [RECORDING.write(tmp_path / name) for name in ('b', 'a')]
    assert find_bags([tmp_path]) == sorted(bags)
    assert find_bags([bags[0]]) == [bags[0]]
    assert find_bags([storage_file(bags[0])]) == [storage_file(bags[0])]
    (tmp_path / 'empty').mkdir()
    with pytest.raises(BagError, match='expected a rosbag2 recording, got none'):
        find_bags([tmp_path / 'empty'])
