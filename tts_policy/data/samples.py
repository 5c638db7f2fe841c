# SPDX-License-Identifier: Apache-2.0
"""The one stream of samples that recordings and data sets become.

Replay, windows and reports read samples alone. `bag_samples` makes them of recorded messages,
`ArraySamples` of the arrays of an episode with a row a frame. What a stream of such an episode is
made of is written as array names joined by commas, each with a range of columns if need be:
`keypoint,state[:2]`. Joints are taken by name where the columns are named like those of the
contract, and in the order of the columns where their number is the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tts_policy.control.conversions import ConversionError
from tts_policy.control.images import ImageFit, check_size, fit_image
from tts_policy.data.reader import BagError
from tts_policy.policy.contract import PolicyContract

# Stamps of a data set begin at zero, which in ROS is no time.
START_NS = 1_000_000_000
_SELECTION = re.compile(r'([^\[\],]+)(?:\[(\d*):(\d*)\])?')


@dataclass(frozen=True)
class Command:
    """A commanded trajectory: set-points [P, A] due at due_ns [P]."""

    due_ns: NDArray[np.int64]
    positions: NDArray[np.float64]

    def at(self, time_ns: int) -> NDArray[np.float64]:
        """Set-point [A], linear between points and held before and after them."""
        return np.array([np.interp(time_ns, self.due_ns, c) for c in self.positions.T])


@dataclass(frozen=True)
class Sample:
    """One converted message.

    key: a camera (value uint8 [H, W, 3]), 'joints' (value [J] of the observation, acted [A] of
    the action's joints), 'commands' (command), or 'cut'.
    """

    key: str
    stamp_ns: int
    received_ns: int
    value: NDArray[Any] | None = None
    acted: NDArray[np.float64] | None = None
    command: Command | None = None


class SampleSource(Protocol):
    """Where samples come from: a recording, or an episode of somebody's data set."""

    @property
    def name(self) -> str:
        """What problems are reported of."""

    @property
    def contract(self) -> PolicyContract:
        """What the samples were converted for."""

    @property
    def has_commands(self) -> bool:
        """Whether there are samples of commands."""

    def __iter__(self) -> Iterator[Sample]:
        """Samples in the order in which they came; BagError where there is damage."""

    def problems(self) -> list[str]:
        """One line for everything that did not fit, once all samples were read."""


@dataclass(frozen=True)
class Selection:
    """Columns of one array."""

    array: str
    columns: slice


def parse_selections(text: str) -> list[Selection]:
    """Read a stream such as `keypoint,state[:2]`; raises BagError."""
    selections = []
    for part in text.split(','):
        match = _SELECTION.fullmatch(part.strip())
        if match is None:
            raise BagError(f'stream: expected arrays such as keypoint,state[:2], got {text!r}')
        first, last = (int(number) if number else None for number in match.group(2, 3))
        selections.append(Selection(match[1], slice(first, last)))
    return selections


def take_columns(
    values: NDArray[np.float64],
    columns: Sequence[str] | None,
    wanted: Sequence[str],
    where: str,
) -> NDArray[np.float64]:
    """Columns [F, len(wanted)] of values [F, C], by name or else by order.

    Raises
    ------
    BagError
        if neither names nor number fit, or a value is not finite.

    """
    named = set(wanted) & set(columns or ())
    if len(named) == len(wanted):
        assert columns is not None
        values = values[:, [list(columns).index(name) for name in wanted]]
    elif named or values.shape[1] != len(wanted):
        raise BagError(
            f'{where}: expected {len(wanted)} columns {list(wanted)}, '
            f'got {values.shape[1]}{"" if columns is None else f" {list(columns)}"}'
        )
    if not np.isfinite(values).all():
        raise BagError(f'{where}: expected finite numbers, got {values[~np.isfinite(values)][0]}')
    return values


@dataclass(frozen=True)
class ArraySamples:
    """Samples of one episode of F frames: joints [F, J], actions [F, A] if there are any.

    images: frames uint8 [H, W, 3] of every camera, in the order of time.
    """

    name: str
    contract: PolicyContract
    frame_s: float
    joints: NDArray[np.float64]
    actions: NDArray[np.float64] | None
    images: Mapping[str, Iterable[NDArray[np.uint8]]]
    fit: ImageFit = ImageFit.EXACT

    def __post_init__(self) -> None:
        """Check that a policy could have been trained on this; raises BagError."""
        observed, acted = self.contract.observation.joints, self.contract.action.joints
        if self.actions is None and not set(acted) <= set(observed):
            raise BagError(
                f'{self.name}: expected commands, got none, and '
                f'{sorted(set(acted) - set(observed))} are not observed, '
                'so measured positions cannot replace them'
            )

    @property
    def has_commands(self) -> bool:
        """Whether there are actions."""
        return self.actions is not None

    def problems(self) -> list[str]:
        """Nothing: what does not fit ends the reading."""
        return []

    def __iter__(self) -> Iterator[Sample]:
        """Samples frame by frame; BagError for an image that does not fit or is missing."""
        observed = self.contract.observation.joints
        acted = [observed.index(j) for j in self.contract.action.joints if j in observed]
        cameras = {key: iter(frames) for key, frames in self.images.items()}
        for frame, joints in enumerate(self.joints):
            stamp_ns = START_NS + round(frame * self.frame_s * 1e9)
            yield Sample('joints', stamp_ns, stamp_ns, joints, joints[acted])
            if self.actions is not None:
                command = Command(np.array([stamp_ns]), self.actions[frame : frame + 1])
                yield Sample('commands', stamp_ns, stamp_ns, command=command)
            for key, frames in cameras.items():
                image = next(frames, None)
                if image is None:
                    raise BagError(
                        f'{self.name}: {key}: expected {len(self.joints)} images, got {frame}'
                    )
                yield Sample(key, stamp_ns, stamp_ns, self._fitted(key, image))

    def _fitted(self, key: str, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        size = next((c.height, c.width) for c in self.contract.observation.cameras if c.key == key)
        if image.ndim != 3 or image.shape[2] != 3:
            raise BagError(f'{self.name}: {key}: expected images [H, W, 3], got {image.shape}')
        try:
            check_size((image.shape[0], image.shape[1]), *size, key, self.fit)
        except ConversionError as error:
            raise BagError(f'{self.name}: {error}') from None
        return fit_image(np.ascontiguousarray(image), *size, self.fit)


def read_arrays(
    name: str,
    contract: PolicyContract,
    frame_s: float,
    streams: Mapping[str, str],
    fit: ImageFit,
    numbers: Callable[[str], tuple[NDArray[np.float64], list[str]]],
    frames: Callable[[str], Iterable[NDArray[np.uint8]]],
) -> ArraySamples:
    """Samples of an episode.

    streams: arrays of every camera key, of joints and of commands (empty for none); numbers: gives
    an array [F, C] and the names of its columns; frames: gives the images of a camera.

    Raises
    ------
    BagError
        if the columns do not fit the contract.

    """

    def columns(stream: str, wanted: Sequence[str]) -> NDArray[np.float64]:
        parts, names = [], []
        for selection in parse_selections(streams[stream]):
            values, every = numbers(selection.array)
            parts.append(values[:, selection.columns])
            names += every[selection.columns]
        return take_columns(np.concatenate(parts, 1), names, wanted, f'{name}: {stream}')

    return ArraySamples(
        name,
        contract,
        frame_s,
        columns('joints', contract.observation.joints),
        columns('commands', contract.action.joints) if streams['commands'] else None,
        {c.key: frames(streams[c.key]) for c in contract.observation.cameras},
        fit,
    )
