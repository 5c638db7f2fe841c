# SPDX-License-Identifier: Apache-2.0
"""Small YAML that stands for a lot is refused before anything walks it."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from tts_policy.data.reader import BagError, BagReader
from tts_policy.policy.bundle import BundleError, load_bundle
from tts_policy.policy.contract import read_contract
from tts_policy.policy.yaml_file import parse_yaml

LEVELS = 'abcdefghijkl'
BOMB = 'a: &a [x, x, x, x, x, x, x, x, x]\n' + ''.join(
    f'{name}: &{name} [{", ".join(["*" + below] * 9)}]\n' for below, name in pairwise(LEVELS)
)


def test_aliases_that_repeat_little_are_read() -> None:
    text = 'base: &base {gain: 2.0}\nleft: *base\nright: *base\n'
    assert parse_yaml(text) == yaml.safe_load(text)


@pytest.mark.fault
@pytest.mark.parametrize(
    ('text', 'reason'),
    [
        (BOMB, 'at most 1000000 values'),
        ('[' * 2000 + ']' * 2000, 'at most 50 levels'),
        ('- &a [*a]', 'a circle'),
        ('#' * (9 << 20), 'at most 8388608 characters'),
    ],
    ids=['aliases', 'depth', 'circle', 'size'],
)
def test_yaml_beyond_the_limits_is_refused_at_once(tmp_path: Path, text: str, reason: str) -> None:
    for name in ('metadata.yaml', 'model.yaml'):
        (tmp_path / name).write_text(text)
    began_s = time.monotonic()
    with pytest.raises(yaml.YAMLError, match=reason):
        parse_yaml(text)
    with pytest.raises(BagError, match=reason):
        BagReader(tmp_path)
    with pytest.raises(BundleError, match=reason):
        load_bundle(tmp_path)
    with pytest.raises(ValueError, match=reason) as error:
        read_contract(tmp_path / 'model.yaml')
    assert len(str(error.value)) < 300 + len(str(tmp_path))
    assert time.monotonic() - began_s < 10
