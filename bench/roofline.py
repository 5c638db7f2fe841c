# SPDX-License-Identifier: Apache-2.0
"""Ceilings of one CPU thread, and how near the denoiser's linear layers come to them.

Measured are products of large matrices by type, reading by working set, and linear layers with few
rows by the way their weights are kept; the packed engine chooses by the last. Layers of one shape
are called in turn, as in a chunk, so that the weights do not stay in the first caches, and the
kinds are interleaved. All times are processor time, which other processes change little.

    .venv/bin/python bench/roofline.py --rows 10 --json out/roofline.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine
from torch import Tensor
from torch.nn import functional as F

SIZE = 512
WORKING_SETS_MIB = (0.5, 4, 24, 96)
SHAPES = ((256, 768), (256, 256), (256, 1024), (1024, 256))
LAYERS = 16

Linear = Callable[[Tensor], Tensor]


def percentiles(taken_s: list[float], unit: float) -> dict[str, float]:
    """Return p50, p95 and p99 of times, in `unit` seconds."""
    values = np.percentile(taken_s, (50, 95, 99)) / unit
    return dict(zip(('p50', 'p95', 'p99'), values.round(2).tolist(), strict=True))


def timed(call: Callable[[], object], rounds: int) -> list[float]:
    """Processor seconds of every call, after one for warm-up."""
    call()
    taken = []
    for _ in range(rounds):
        started = time.process_time()
        call()
        taken.append(time.process_time() - started)
    return taken


def ceilings(rounds: int) -> dict[str, float]:
    """GFLOP/s of large products and GB/s of reading, by the median time."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(SIZE, SIZE).to(dtype)
        seconds = np.median(timed(partial(torch.matmul, a, a), rounds))
        found[f'{dtype} product of {SIZE}^3, GFLOP/s'] = 2 * SIZE**3 / seconds / 1e9
    for mib in WORKING_SETS_MIB:
        x = torch.randn(int(mib * 2**18))
        found[f'reading {mib} MiB, GB/s'] = x.nbytes / np.median(timed(x.sum, rounds)) / 1e9
    return {name: round(float(value), 1) for name, value in found.items()}


def onednn(weight: Tensor, bias: Tensor, rows: int) -> Linear:
    """Weights packed by oneDNN, in their own type."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    pointwise = torch.ops.mkldnn._linear_pointwise
    return lambda x: pointwise(x.to(weight.dtype), packed, bias, 'none', [], 'none').float()


def fbgemm_half(weight: Tensor, bias: Tensor, rows: int) -> Linear:
    """Weights kept in half precision by FBGEMM and multiplied in single precision."""
    packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
    return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)


def kinds(weight: Tensor, bias: Tensor, rows: int) -> dict[str, Linear]:
    """Ways to compute x W^T + b for x [rows, in] in float32."""
    transposed = weight.t().contiguous()
    return {
        'torch': lambda x: F.linear(x, weight, bias),
        'matrix_product': lambda x: torch.addmm(bias, x, transposed),
        'onednn_float32': onednn(weight, bias, rows),
        'fbgemm_float16_storage': fbgemm_half(weight, bias, rows),
        'onednn_bfloat16': onednn(weight.bfloat16(), bias.bfloat16(), rows),
    }


def linear_layers(shape: tuple[int, int], rows: int, rounds: int) -> dict[str, dict[str, float]]:
    """Percentiles in microseconds of one layer, by kind."""
    inputs, outputs = shape
    x = torch.randn(rows, inputs)
    layers = [
        kinds(torch.randn(outputs, inputs) / 16, torch.randn(outputs), rows) for _ in range(LAYERS)
    ]
    taken: dict[str, list[float]] = {name: [] for name in layers[0]}
    for turn in range(rounds + 1):
        for name, times in taken.items():
            started = time.process_time()
            for layer in layers:
                layer[name](x)
            if turn:
                times.append((time.process_time() - started) / LAYERS)
    return {name: percentiles(times, 1e-6) for name, times in taken.items()}


@torch.inference_mode()
def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--rows', type=int, default=10, help='tokens T')
    parser.add_argument('--rounds', type=int, default=100, help='measured calls, after one')
    parser.add_argument('--json', type=Path, help='write the result to this file as well')
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = {
        'machine': describe_machine('cpu'),
        'rows': args.rows,
        'warm_up': 1,
        'rounds': args.rounds,
        'ceilings': ceilings(args.rounds),
        'linear_us': {
            f'{a}x{b}': linear_layers((a, b), args.rows, args.rounds) for a, b in SHAPES
        },
    }
    text = json.dumps(data, indent=1)
    print(text)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
