# SPDX-License-Identifier: Apache-2.0
"""Joint states become positions by name, or are refused with the reason."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from tts_policy.control.conversions import ConversionError, joint_positions, seconds_to_ns


def test_joints_are_taken_by_name_whatever_their_order() -> None:
    msg = SimpleNamespace(name=['c', 'extra', 'a', 'b'], position=[3.0, 9.0, 1.0, 2.0])
    assert joint_positions(msg, ('a', 'b', 'c'), 'joint_states').tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ('names', 'positions', 'reason'),
    [
        (['a', 'c'], [1.0, 2.0], r"missing \['b'\]"),
        (['a', 'b'], [1.0], '2 names and 1 positions'),
        (['a', 'b', 'b'], [1.0, 2.0, 3.0], r"each joint once, got \['b'\]"),
        (['a', 'b'], [1.0, float('nan')], "finite positions of at most 1e.06, got {'b': nan}"),
        (['a', 'b'], [float('-inf'), 1.0], "finite positions .*, got {'a': -inf}"),
        (['a', 'b'], [1.0, 1e39], "finite positions .*, got {'b': 1e"),
        ([], [], 'missing'),
    ],
)
def test_joint_states_that_do_not_fit_are_refused(
    names: list[str], positions: list[float], reason: str
) -> None:
    with pytest.raises(ConversionError, match=f'joint_states: .*{reason}'):
        joint_positions(
            SimpleNamespace(name=names, position=positions), ('a', 'b'), 'joint_states'
        )


def test_thousands_of_names_are_refused_in_a_short_line_and_in_linear_time() -> None:
    names = [f'joint_{n % 20_000}' for n in range(100_000)]
    msg = SimpleNamespace(name=names, position=[0.0] * len(names))
    began_s = time.process_time()
    with pytest.raises(ConversionError, match=r'and 19988 more repeatedly') as refused:
        joint_positions(msg, ('joint_1', 'joint_2'), 'joint_states')
    # Counting every name anew takes minutes.
    assert time.process_time() - began_s < 5.0
    assert len(str(refused.value)) < 400


def test_seconds_are_rounded_to_whole_nanoseconds() -> None:
    assert seconds_to_ns(0.05) == 50_000_000
    assert seconds_to_ns(0.1 + 0.2) == 300_000_000
