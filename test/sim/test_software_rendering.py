# SPDX-License-Identifier: Apache-2.0
"""The software renderer in one process with what a torch for CUDA brings."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest


@pytest.mark.skipif(find_spec('triton') is None, reason='triton is not on the path')
@pytest.mark.skipif(find_spec('robosuite') is None, reason='robosuite is not installed')
def test_the_simulated_camera_and_triton_live_in_one_process() -> None:
    script = """
from tts_policy.sim.tasks import PANDA_TASKS
import torch.utils.flop_counter  # imports triton where it can
world = PANDA_TASKS['lift'].world()
world.reset(0)
assert world.render().max() > 0
"""
    command = [sys.executable, '-c', script]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
