# SPDX-License-Identifier: Apache-2.0
"""The published results belong to the bundles that are published with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip('robosuite', reason='robosuite is not installed')
pytest.importorskip('trajectory_msgs', reason='no ROS messages here')

from tts_policy.evaluate.digest import ExpectedDigests
from tts_policy.policy.bundle import load_bundle
from tts_policy.sim.tasks import task_named

RESULTS = Path(__file__).parents[2] / 'docs' / 'results.json'


def test_every_row_was_measured_with_the_plans_of_the_bundle_of_its_task() -> None:
    rows = json.loads(RESULTS.read_text())
    tasks = {row['task'] for row in rows}
    assert tasks >= {'lift', 'stack', 'can'}
    expected = ExpectedDigests({task: load_bundle(task_named(task).bundle) for task in tasks})
    others = [(row['task'], row['variant']) for row in rows if expected.matching([row]) != [row]]
    assert others == []
