# SPDX-License-Identifier: Apache-2.0
"""The page about the robot and the security policy name what the node has, no more and no less."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

pytest.importorskip('rclpy', reason='rclpy is not installed')

from processes import REPOSITORY

from tts_policy.node.interface import ENDPOINTS, Direction
from tts_policy.node.parameter_table import PARAMETERS
from tts_policy.node.reference import markdown, renewed

PAGE = REPOSITORY / 'docs' / 'reference.md'
POLICY = REPOSITORY / 'config' / 'sros2_policy.xml'


def test_the_tables_of_the_page_are_those_of_the_code() -> None:
    text = PAGE.read_text(encoding='utf-8')
    assert text == renewed(text), 'run: python -m tts_policy.node.reference docs/reference.md'


def test_the_tables_have_a_row_for_every_endpoint_and_parameter() -> None:
    rows = [line for line in markdown().splitlines() if line.startswith('| ')]
    assert len(rows) == len(ENDPOINTS) + len(PARAMETERS) + 4
    assert all(row.count('`') >= 2 for row in rows if '---' not in row and 'name' not in row[:12]
               and 'parameter |' not in row)  # fmt: skip


def test_a_page_without_its_marks_is_refused() -> None:
    with pytest.raises(ValueError, match='page: expected'):
        renewed('# nothing generated here')


@pytest.mark.parametrize(
    ('direction', 'path'),
    [
        (Direction.IN, 'topics[@subscribe]/topic'),
        (Direction.OUT, 'topics[@publish]/topic'),
        (Direction.SERVICE, 'services[@reply]/service'),
    ],
)
def test_the_security_policy_allows_every_endpoint(direction: Direction, path: str) -> None:
    allowed = {element.text for element in ElementTree.parse(POLICY).iterfind(f'.//{path}')}
    names = {e.name.replace('KEY', 'camera') for e in ENDPOINTS if e.direction is direction}
    assert names <= allowed
