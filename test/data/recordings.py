# SPDX-License-Identifier: Apache-2.0
"""Recordings of the small robot of the tests, in every form in which rosbag2 writes them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from backports import zstd
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from tts_policy.data.reader import BagReader

MS = 1_000_000
START_NS = 5_000 * MS
HEIGHT, WIDTH = 24, 32
JOINTS = ('shoulder', 'elbow', 'finger')
STORE = get_typestore(Stores.ROS2_JAZZY)
TYPES = STORE.types


@dataclass(frozen=True)
class Recording:
    """Frames every 50 ms and joint states every 10 ms; `gaps_after` frames are followed by 2 s."""

    frames: int = 40
    gaps_after: tuple[int, ...] = ()
    back_after: int | None = None
    image: str = 'rgb8'
    joints: tuple[str, ...] = ('finger', 'spare', 'elbow', 'shoulder')
    commands: bool = True
    storage: str = 'mcap'
    compression: str = 'none'
    image_topic: str = '/camera/image'
    noise: bool = True
    size: tuple[int, int] = (HEIGHT, WIDTH)

    def messages(self) -> Iterator[tuple[str, int, Any]]:
        """Topic, stamp and message, in the order in which they are recorded."""
        stamp = START_NS
        for frame in range(self.frames):
            for state in range(5):
                yield '/joint_states', stamp + state * 10 * MS, self.state(stamp + state * 10 * MS)
                if state == 0:
                    yield self.image_topic, stamp, self.picture(frame, stamp)
                    if self.commands:
                        yield '/joint_trajectory', stamp, self.command(stamp)
            stamp += 50 * MS
            if frame in self.gaps_after:
                stamp += 2_000 * MS
            if frame == self.back_after:
                stamp -= 4_000 * MS

    def write(self, path: Path, messages: list[tuple[str, int, Any]] | None = None) -> Path:
        """Write the bag folder and return it; it is received as it is stamped, or just after."""
        writer = Writer(path, version=9, storage_plugin=StoragePlugin[self.storage.upper()])
        if self.compression in ('file', 'message', 'storage'):
            writer.set_compression(
                CompressionMode[self.compression.upper()], CompressionFormat.ZSTD
            )
        with writer:
            connections: dict[str, Any] = {}
            received = 0
            for topic, stamp, message in self.messages() if messages is None else messages:
                if topic not in connections:
                    connections[topic] = writer.add_connection(
                        topic, message.__msgtype__, typestore=STORE
                    )
                received = max(received + 1, stamp)
                raw = STORE.serialize_cdr(message, message.__msgtype__)
                writer.write(connections[topic], received, raw)
        return path

    def pixels(self, frame: int) -> np.ndarray:
        """Smooth picture [H, W, 3] of a frame, with some noise unless it is for jpeg."""
        y, x = np.mgrid[: self.size[0], : self.size[1]]
        smooth = np.stack([4 * x, 8 * y, 2 * x + 3 * y + 2 * frame], -1)
        grain = np.random.default_rng(frame).integers(0, 20, smooth.shape)
        return (smooth + self.noise * grain).astype(np.uint8)

    def picture(self, frame: int, stamp_ns: int) -> Any:
        """Camera message of a frame."""
        rgb = self.pixels(frame)
        if self.image in ('jpeg', 'png'):
            options = [cv2.IMWRITE_JPEG_QUALITY, 98] if self.image == 'jpeg' else []
            _, data = cv2.imencode(f'.{self.image}', rgb[..., ::-1], options)
            return compressed_image(stamp_ns, self.image, data.ravel())
        return TYPES['sensor_msgs/msg/Image'](
            header(stamp_ns), *self.size, 'rgb8', 0, 3 * self.size[1], rgb.ravel()
        )

    def state(self, stamp_ns: int) -> Any:
        """Joint state: joint j moves as a slow sine of its own."""
        phase = stamp_ns * 1e-9
        value = {name: np.sin(phase + j) for j, name in enumerate(JOINTS)}
        positions = np.array([value.get(name, 9.0) for name in self.joints])
        nothing = np.zeros(0)
        return TYPES['sensor_msgs/msg/JointState'](
            header(stamp_ns), list(self.joints), positions, nothing, nothing
        )

    def command(self, stamp_ns: int) -> Any:
        """One set-point, due a period later."""
        phase = stamp_ns * 1e-9 + 0.05
        nothing = np.zeros(0)
        point = TYPES['trajectory_msgs/msg/JointTrajectoryPoint'](
            np.array([np.sin(phase + j) for j in range(len(JOINTS))]),
            nothing,
            nothing,
            nothing,
            TYPES['builtin_interfaces/msg/Duration'](0, 50 * MS),
        )
        return TYPES['trajectory_msgs/msg/JointTrajectory'](
            header(stamp_ns), list(JOINTS), [point]
        )


def header(stamp_ns: int) -> Any:
    """Header of a stamp."""
    stamp = TYPES['builtin_interfaces/msg/Time'](*divmod(stamp_ns, 1_000_000_000))
    return TYPES['std_msgs/msg/Header'](stamp, 'base')


def compressed_image(stamp_ns: int, scheme: str, data: np.ndarray) -> Any:
    """CompressedImage of encoded bytes."""
    return TYPES['sensor_msgs/msg/CompressedImage'](header(stamp_ns), scheme, data)


def storage_file(bag: Path) -> Path:
    """The file of a bag that holds its messages."""
    return next(path for path in bag.iterdir() if path.suffix != '.yaml')


def add_file(bag: Path, other: Path) -> None:
    """Make the file of another mcap bag the second one of this."""
    second = bag / 'second.mcap'
    shutil.copy(storage_file(other), second)
    metadata = yaml.safe_load((bag / 'metadata.yaml').read_text())
    metadata['rosbag2_bagfile_information']['relative_file_paths'].append(second.name)
    (bag / 'metadata.yaml').write_text(yaml.safe_dump(metadata))


def make_chunk_bomb(bag: Path) -> int:
    """Put 256 MiB of zeros into the first chunk of a compressed bag; returns what it promises."""
    reader = BagReader(bag)
    with reader._open(storage_file(bag)) as storage:
        chunk = storage.chunks[0]
    bomb = zstd.compress(bytes(1 << 28), 19)
    assert len(bomb) < chunk.compressed_size, 'the bomb has to fit into the place of the chunk'
    # A frame to be skipped fills the rest: its magic, its length, its content.
    rest = chunk.compressed_size - len(bomb) - 8
    filler = b'\x50\x2a\x4d\x18' + rest.to_bytes(4, 'little') + bytes(rest)
    path = storage_file(bag)
    data = bytearray(path.read_bytes())
    at = chunk.chunk_start_offset + 9 + 40 + len(chunk.compression)
    data[at : at + chunk.compressed_size] = bomb + filler
    path.write_bytes(data)
    return int(chunk.uncompressed_size)
