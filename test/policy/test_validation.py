# SPDX-License-Identifier: Apache-2.0
"""Settings are strict, and what is wrong with them is one short line: THING: expected A, got B."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Annotated

import pytest

from tts_policy.policy.validation import (
    WRITTEN_IF_SET,
    Flag,
    Integer,
    Mismatch,
    Number,
    Size,
    Spec,
    Text,
    checked,
    one_of,
    quoted,
)


@checked('wheel')
class Wheel(Spec):
    teeth: Size
    kind: Annotated[Text, one_of('spur', 'worm')] = 'spur'


@checked('gear')
class Gear(Spec):
    ratio: Number
    wheels: tuple[Wheel, ...] = ()
    offset: Integer = 0
    locked: Annotated[Flag, WRITTEN_IF_SET] = False


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: Gear(True), 'gear.ratio: expected a number, got True'),
        (lambda: Gear('1'), "gear.ratio: expected a number, got '1'"),
        (lambda: Gear(float('inf')), 'gear.ratio: expected a finite number, got inf'),
        (lambda: Gear(1.0, (), 1.0), 'gear.offset: expected an integer, got 1.0'),
        (lambda: Gear(1.0, locked=1), 'gear.locked: expected true or false, got 1'),
        (lambda: Gear(), 'gear.ratio: expected a value, got nothing'),
        (
            lambda: Gear(1.0, hue='red'),
            "gear.hue: expected no field of this name, got 'red'",
        ),
        (lambda: Wheel(0), 'wheel.teeth: expected at least 1, got 0'),
        (lambda: Wheel(8, 'bevel'), "wheel.kind: expected 'spur' or 'worm', got 'bevel'"),
        (lambda: Gear.from_dict([1]), 'gear: expected a mapping, got [1]'),
        (
            lambda: Gear.from_dict({'wheels': 'x', 'ratio': 1}),
            "gear.wheels: expected a list, got 'x'",
        ),
        (
            lambda: Gear.from_dict({'ratio': 1, 'wheels': [{'teeth': 8}, {'teeth': 'y' * 500}]}),
            'gear.wheels[1].teeth: expected an integer, got ' + quoted('y' * 500),
        ),
    ],
)
def test_a_setting_that_cannot_be_is_named_in_one_line(
    make: Callable[[], Gear], message: str
) -> None:
    with pytest.raises(Mismatch) as caught:
        make()
    assert str(caught.value) == message
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


def test_settings_are_written_as_they_are_read() -> None:
    for data in (
        {'ratio': 0.5, 'wheels': [{'teeth': 8, 'kind': 'worm'}], 'offset': -1},
        {'ratio': 2.0, 'wheels': [], 'offset': 0, 'locked': True},
    ):
        assert Gear.from_dict(data).to_dict() == data


def test_a_quoted_value_is_short_however_large_it_is() -> None:
    nested: object = 'a' * 1_000_000
    for _ in range(60):
        nested = [nested] * 10
    for value in ('a' * 1_000_000, nested, 10**1000, 10**10_000, {'k' * 1000: nested}):
        assert len(quoted(value)) <= 80
