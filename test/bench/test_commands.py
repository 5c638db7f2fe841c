# SPDX-License-Identifier: Apache-2.0
"""Every benchmark is a command that says what it takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / 'bench'
COMMANDS = sorted(p for p in BENCH.glob('*.py') if '__main__' in p.read_text())


@pytest.mark.parametrize('command', COMMANDS, ids=lambda path: path.stem)
def test_a_benchmark_says_what_it_takes(command: Path) -> None:
    if command.stem == 'soak':
        pytest.importorskip('rclpy', reason='rclpy is not installed')
    result = subprocess.run(
        [sys.executable, command, '--help'], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith('usage:')
