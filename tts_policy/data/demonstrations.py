# SPDX-License-Identifier: Apache-2.0
"""What training reads: rosbag2 recordings, replay buffers of Diffusion Policy, LeRobot data sets.

All of them become samples of the contract and go through the code of the live node from there on.
A recording is one demonstration, and so is every episode of a data set.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from tts_policy.control.images import ImageFit
from tts_policy.data import lerobot_dataset, replay_buffer
from tts_policy.data.bag_samples import (
    SampleReader,
    Topics,
    add_image_fit_argument,
    add_topic_argument,
    parse_pairs,
)
from tts_policy.data.data_check import DataCheck
from tts_policy.data.reader import BagError, BagReader, find_bags
from tts_policy.data.samples import SampleSource
from tts_policy.data.windows import Windows, read_episodes
from tts_policy.policy.contract import CONTRACT_FILE, PolicyContract, read_contract


class DataFormat(Protocol):
    """A module that reads the episodes of one format of data sets; what is no such is a bag."""

    def recognises(self, path: Path) -> bool:
        """Whether a path is such a data set."""

    def episodes(
        self, path: Path, contract: PolicyContract, streams: Mapping[str, str], fit: ImageFit
    ) -> list[Callable[[], SampleSource]]:
        """Readers of all episodes; raises BagError."""


# A new format is a module here, and a word in the help of the argument below.
DATA_FORMATS: tuple[DataFormat, ...] = (replay_buffer, lerobot_dataset)


@dataclass(frozen=True)
class Demonstration:
    """One recording or episode; `open` checks it and gives its samples, or raises BagError."""

    contract: PolicyContract
    open: Callable[[], SampleSource]


def open_bag(
    path: Path, contract: PolicyContract, topics: Topics, fit: ImageFit = ImageFit.EXACT
) -> SampleReader:
    """Samples of a rosbag2 recording; commands must be there unless `topics` has none.

    Raises
    ------
    BagError
        if a topic is missing or of another type.

    """
    samples = SampleReader(BagReader(path), contract, topics, fit=fit)
    if topics.commands is not None and not samples.has_commands:
        raise BagError(
            f'{path}: expected topics {[topics.commands]}, got {sorted(samples.bag.topics)}'
        )
    return samples


def find_demonstrations(
    paths: Sequence[Path],
    contract: PolicyContract,
    streams: Mapping[str, str],
    fit: ImageFit = ImageFit.EXACT,
) -> list[Demonstration]:
    """Demonstrations of all paths, in their order.

    streams: what a camera key, joints, commands or cut are called there, where it is not the
    default; fit: what is done with images of another size.

    Raises
    ------
    BagError
        for a path that is none of these, an unknown stream, or a data set that cannot be read.

    """
    topics = Topics.of(contract, dict(streams))
    found: list[Demonstration] = []
    for path in paths:
        data_format = next((f for f in DATA_FORMATS if f.recognises(path)), None)
        opened: list[Callable[[], SampleSource]]
        if data_format is None:
            opened = [partial(open_bag, bag, contract, topics, fit) for bag in find_bags([path])]
        else:
            opened = data_format.episodes(path, contract, streams, fit)
        found += [Demonstration(contract, one) for one in opened]
    return found


def load_windows(
    demonstrations: Sequence[Demonstration],
    progress: bool = True,
    check: DataCheck | None = None,
) -> Windows:
    """Read all of them into one set of windows; raises BagError naming the first bad one."""
    with tqdm(demonstrations, desc='reading', unit='episode', disable=not progress) as bar:
        episodes = [episode for one in bar for episode in read_episodes(one.open(), check)]
    return Windows(episodes, demonstrations[0].contract)


def demonstrated_contract(demonstrations: Sequence[Path], given: Path | None) -> PolicyContract:
    """Contract of a training: the file that is given, or the one that lies with the recordings.

    Raises
    ------
    ValueError
        where neither is there, or the file holds no contract.

    """
    if given is not None:
        return read_contract(given)
    first = demonstrations[0]
    for folder in (first, first.parent):
        if (folder / CONTRACT_FILE).is_file():
            return read_contract(folder / CONTRACT_FILE)
    raise ValueError(
        f'--contract: expected a YAML file with observation and action, got none, and no '
        f'{CONTRACT_FILE} lies with {first}'
    )


def add_demonstration_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the commands of training have in common about what they read."""
    parser.add_argument(
        'demonstrations',
        nargs='+',
        type=Path,
        help='rosbag2 recordings, folders of them, replay buffers (NAME.zarr, NAME.zarr.zip) or '
        'LeRobot data sets',
    )
    add_topic_argument(parser)
    add_image_fit_argument(parser)
    parser.add_argument('--held-out', type=int, default=10, help='episodes not trained on')


def split_demonstrations(
    args: argparse.Namespace, contract: PolicyContract
) -> tuple[list[Demonstration], list[Demonstration]]:
    """Demonstrations of a command line that are held out, and the others.

    Raises
    ------
    BagError
        as `find_demonstrations`, and where there are too few.

    """
    streams = parse_pairs(args.topic, '--topic', 'STREAM:=TOPIC')
    found = find_demonstrations(args.demonstrations, contract, streams, ImageFit(args.image_fit))
    if not 1 <= args.held_out < len(found):
        raise BagError(
            '--held-out: expected at least one episode and one left to train on, '
            f'got {args.held_out} of {len(found)}'
        )
    return found[: args.held_out], found[args.held_out :]
