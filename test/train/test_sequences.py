# SPDX-License-Identifier: Apache-2.0
"""Sequences of ticks: which episodes they come from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tts_policy.data.windows import Episode, Windows
from tts_policy.policy.contract import ActionSpec, ObservationSpec, PolicyContract
from tts_policy.train.sequences import TickSequence, split_sequences

CONTRACT = PolicyContract(
    ObservationSpec(cameras=(), joints=('x',), steps=1, period_s=0.1),
    ActionSpec(('x',), horizon=4, execute=2, offset_steps=0),
)
# Its features are the joints, which are the number of the episode here.
NETWORK: Any = SimpleNamespace(
    contract=CONTRACT,
    denoiser=SimpleNamespace(device=torch.device('cpu')),
    features=lambda images, joints: joints,
)


def _windows(*lengths: int) -> Windows:
    numbered = enumerate(lengths)
    episodes = [
        Episode({}, {}, np.full((length, 1, 1), float(number)), np.zeros((length, 4, 1)))
        for number, length in numbered
    ]
    return Windows(episodes, CONTRACT)


def _episodes(sequences: list[TickSequence]) -> set[int]:
    return {int(number) for one in sequences for number in one.features.flatten()}


def _split(
    windows: Windows, count: int, seed: int = 0
) -> tuple[list[TickSequence], list[TickSequence]]:
    return split_sequences(NETWORK, windows, count, 3, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ('lengths', 'kept', 'trained'),
    [
        ((9, 9), {0}, {1}),
        ((9, 2, 9, 9, 1), {0}, {2, 3}),
        ((9,) * 9, {0, 1}, {2, 3, 4, 5, 6, 7, 8}),
    ],
)
def test_sequences_kept_back_are_of_episodes_that_are_not_trained_on(
    lengths: tuple[int, ...], kept: set[int], trained: set[int]
) -> None:
    validation, training = _split(_windows(*lengths), 200)
    assert len(validation) == 24 and len(training) == 176
    assert (_episodes(validation), _episodes(training)) == (kept, trained)


@pytest.mark.parametrize(('count', 'kept'), [(2, 1), (7, 1), (8, 2), (96, 24), (400, 24)])
def test_a_quarter_of_the_sequences_is_kept_back(count: int, kept: int) -> None:
    validation, training = _split(_windows(9, 9, 9), count)
    assert (len(validation), len(validation) + len(training)) == (kept, count)


def test_a_seed_gives_the_same_sequences() -> None:
    windows = _windows(9, 8, 7, 6, 5)
    first, second, other = (_split(windows, 40, seed)[1] for seed in (0, 0, 1))
    assert [one.seed for one in first] == [one.seed for one in second]
    assert all(torch.equal(a.features, b.features) for a, b in zip(first, second, strict=True))
    assert [one.seed for one in first] != [one.seed for one in other]


def test_a_single_episode_cannot_be_split() -> None:
    with pytest.raises(
        ValueError, match=r'expected 2 or more episodes of more than 2 windows .* got 1'
    ):
        _split(_windows(9, 2), 8)
