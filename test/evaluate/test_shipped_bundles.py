# SPDX-License-Identifier: Apache-2.0
"""The published results belong to the published bundles, and these serve every sparsity."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip('robosuite', reason='robosuite is not installed')

from tts_policy.evaluate.digest import ExpectedDigests
from tts_policy.evaluate.variants import Variant
from tts_policy.evaluate.worker import Job, Worker
from tts_policy.policy.bundle import load_bundle
from tts_policy.sim.tasks import task_named

ROOT = Path(__file__).parents[2]


def test_every_row_was_measured_with_the_plans_of_the_bundle_of_its_task() -> None:
    rows = json.loads((ROOT / 'docs/results.json').read_text())
    tasks = {row['task'] for row in rows}
    assert tasks >= {'lift', 'stack', 'can'}
    bundles = {task: load_bundle(ROOT / task_named(task).bundle) for task in tasks}
    expected = ExpectedDigests(bundles)
    others = [(row['task'], row['variant']) for row in rows if expected.matching([row]) != [row]]
    assert others == []


def test_more_computing_than_the_nearest_table_has_does_not_hurt() -> None:
    worker = Worker({'lift': ROOT / 'models/panda_lift'}, sequences=1)
    try:
        at = {
            s: worker.run(Job('lift', Variant.parse(f'ddim10:learned:{s}')))['l1_error']
            for s in (0.3, 0.5, 0.75, 0.8)
        }
    finally:
        worker.close()
    assert at[0.75] < 1.5 * at[0.8]
    assert at[0.3] < 1.5 * at[0.5] < at[0.8]
