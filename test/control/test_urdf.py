# SPDX-License-Identifier: Apache-2.0
"""Limits of a robot description, and the descriptions that are refused."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tts_policy.control.urdf import UrdfError, UrdfLimits, parse_limits

URDF = """<?xml version="1.0"?>
<robot name="arm">
  <link name="base"/>
  <joint name="shoulder" type="revolute">
    <limit lower="-2.5" upper="2.5" velocity="1.5" effort="10"/>
    <safety_controller soft_lower_limit="-2.0" soft_upper_limit="2.9" k_velocity="1"/>
  </joint>
  <joint name="wheel" type="continuous"><limit velocity="3" effort="1"/></joint>
  <joint name="finger" type="prismatic"><limit upper="0.04" velocity="0.2" effort="1"/></joint>
  <joint name="weld" type="fixed"/>
  <transmission name="t"><joint name="shoulder"><limit lower="9"/></joint></transmission>
</robot>"""


def test_every_moving_joint_has_its_limits_and_soft_limits_tighten() -> None:
    assert parse_limits(URDF) == {
        'shoulder': UrdfLimits(-2.0, 2.5, 1.5),
        'wheel': UrdfLimits(-math.inf, math.inf, 3.0),
        'finger': UrdfLimits(0.0, 0.04, 0.2),
    }


@pytest.mark.fault
@pytest.mark.parametrize('encoding', ['latin-1', 'utf-16', 'idna', 'no-such-encoding'])
def test_a_declared_encoding_changes_nothing(encoding: str) -> None:
    declared = URDF.replace('version="1.0"', f'version="1.0" encoding="{encoding}"')
    assert parse_limits(declared) == parse_limits(URDF)


@pytest.mark.fault
@pytest.mark.parametrize(
    ('text', 'reason'),
    [
        ('<!DOCTYPE robot [<!ENTITY e "x">]><robot>&e;</robot>', 'got <!DOCTYPE robot>'),
        ('<!DOCTYPE robot SYSTEM "file:///etc/passwd"><robot/>', 'document type'),
        ('<robot><joint', 'expected XML'),
        ('', 'expected XML'),
        ('\x00\ud800', 'expected XML'),
        ('<sdf/>', 'expected a <robot>, got <sdf>'),
        (URDF.replace('-2.5', 'low'), "shoulder: expected a number for lower, got 'low'"),
        (URDF.replace('-2.5', 'nan'), 'expected a number for lower'),
        (URDF.replace('velocity="1.5"', 'velocity="inf"'), 'expected a number for velocity'),
        (URDF.replace('lower="-2.5"', 'lower="2.6"'), 'expected lower at most upper'),
        (URDF.replace('"wheel"', '"shoulder"'), 'expected each joint named once'),
    ],
)
def test_what_is_no_sound_description_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(UrdfError, match='robot_description: ') as caught:
        parse_limits(text)
    assert reason in str(caught.value)
    assert '\n' not in str(caught.value)


@pytest.mark.fault
def test_entities_are_refused_before_they_grow() -> None:
    laughs = ''.join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10 if i else "ha"}">' for i in range(30))
    began_s = time.perf_counter()
    with pytest.raises(UrdfError, match='document type declaration'):
        parse_limits(f'<!DOCTYPE robot [{laughs}]><robot>&l29;</robot>')
    assert time.perf_counter() - began_s < 1.0


@given(st.text(max_size=200))
def test_any_text_gives_limits_or_a_reason(text: str) -> None:
    for candidate in (text, f'<robot>{text}</robot>'):
        try:
            limits = parse_limits(candidate)
        except UrdfError:
            continue
        assert all(limit.lower <= limit.upper for limit in limits.values())
