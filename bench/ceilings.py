# SPDX-License-Identifier: Apache-2.0
"""Ceilings of the machine for a roofline: arithmetic by type, and reading by working set.

One thread; processor time, which other processes on the machine change little.

.venv/bin/python bench/ceilings.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from machine import describe_machine

SIZE = 512
WORKING_SETS_MIB = (0.5, 4, 24, 96)


def median_s(call: Callable[[], object], rounds: int = 60) -> float:
    """Median processor seconds of a call, after one that is not counted."""
    call()
    taken = []
    for _ in range(rounds):
        started = time.process_time()
        call()
        taken.append(time.process_time() - started)
    return float(np.median(taken))


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    print(', '.join(f'{key} {value}' for key, value in describe_machine('cpu').items()))
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(SIZE, SIZE).to(dtype)
        flops, seconds = 2 * SIZE**3, median_s(partial(torch.matmul, a, a))
        print(f'{dtype} product {SIZE}^3: {flops / seconds / 1e9:.1f} GFLOP/s')
    for mib in WORKING_SETS_MIB:
        x = torch.randn(int(mib * 2**18))
        print(f'reading {mib} MiB: {x.nbytes / median_s(x.sum) / 1e9:.1f} GB/s')


if __name__ == '__main__':
    main()
