# SPDX-License-Identifier: Apache-2.0
"""Sparsity is a knob: between the tables of a pruner it works as well as at one of them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip('robosuite', reason='robosuite is not installed')
pytest.importorskip('trajectory_msgs', reason='no ROS messages here')

from tts_policy.evaluate.variants import Variant
from tts_policy.evaluate.worker import Job, Worker

BUNDLE = Path(__file__).parents[2] / 'models' / 'panda_lift'


def test_more_computing_than_the_nearest_table_has_does_not_hurt() -> None:
    worker = Worker({'lift': BUNDLE}, sequences=1)
    try:
        at = {
            sparsity: worker.run(Job('lift', Variant.parse(f'ddim10:learned:{sparsity}')))[
                'l1_error'
            ]
            for sparsity in (0.3, 0.5, 0.75, 0.8)
        }
    finally:
        worker.close()
    assert at[0.75] < 1.5 * at[0.8]
    assert at[0.3] < 1.5 * at[0.5] < at[0.8]
