# SPDX-License-Identifier: Apache-2.0
"""Time of the denoiser's linear layers at batch size one, by the way their weights are kept.

It is what `core/packed.py` chooses by. Layers of one shape are taken in turn, as a chunk does, so
that the weights do not stay in the first caches; kinds are interleaved. Times are processor time
of the one thread, which other processes on the machine change little.

    .venv/bin/python bench/linear.py --rows 10 --json out/linear.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine
from torch import Tensor
from torch.nn import functional as F

SHAPES = ((256, 768), (256, 256), (256, 1024), (1024, 256))
LAYERS = 16

Linear = Callable[[Tensor], Tensor]


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


@torch.inference_mode()
def measure(shape: tuple[int, int], rows: int, rounds: int) -> dict[str, float]:
    """Median microseconds of one layer by kind."""
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
    return {name: round(1e6 * float(np.median(times)), 1) for name, times in taken.items()}


def main() -> None:
    """Measure every shape, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rows', type=int, default=10, help='tokens T')
    parser.add_argument('--rounds', type=int, default=100, help='times every layer is run')
    parser.add_argument('--json', type=Path, help='write the result to this file as well')
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    machine = describe_machine('cpu')
    print(', '.join(f'{key} {value}' for key, value in machine.items()))
    results = {}
    for shape in SHAPES:
        name = f'{shape[0]}x{shape[1]}'
        results[name] = measure(shape, arguments.rows, arguments.rounds)
        print(name, ', '.join(f'{kind} {us} us' for kind, us in results[name].items()))
    if arguments.json is not None:
        data = {'machine': machine, 'rows': arguments.rows, 'microseconds': results}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(data, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
