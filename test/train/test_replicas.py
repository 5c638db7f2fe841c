# SPDX-License-Identifier: Apache-2.0
"""Processes that share a training: what each looks at, and what they know together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tts_policy.train.replicas import Replicas

GATHERING = """
import torch
from tts_policy.train.replicas import Replicas

own = Replicas.joined()
share = own.share(list(range(5)))
assert own.count == 3 and len(share) < 5, own
assert own.gathered(torch.tensor(share, dtype=torch.float32), 5).tolist() == [0, 1, 2, 3, 4]
assert own.gathered(torch.zeros(len(own.share('x'))), 1).tolist() == [0]
assert own.summed(torch.full((2, 2), 1.0 + own.rank)).tolist() == [[6, 6], [6, 6]]
assert own.of_first({'made': 7} if own.is_first else None) == {'made': 7}
own.leave()
"""


@pytest.mark.slow
def test_processes_gather_what_each_of_them_knows(tmp_path: Path) -> None:
    script = tmp_path / 'gathering.py'
    script.write_text(GATHERING)
    command = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '3', script]
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@given(st.integers(1, 9), st.integers(0, 40))
def test_shares_of_a_batch_are_a_part_of_it_each(count: int, total: int) -> None:
    items = list(range(total))
    shares = [Replicas(rank, count).share(items) for rank in range(count)]
    assert [item for share in shares for item in share] == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
