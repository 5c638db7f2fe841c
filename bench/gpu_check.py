# SPDX-License-Identifier: Apache-2.0
"""Whether every engine is right on this device: against the eager one, and in what it allocates.

    .venv/bin/python bench/gpu_check.py --json out/gpu_check.json

Chunks of random plans over several episodes, the sparsity changed between ticks, are compared with
those of the eager engine: once as they are, once with a pruner whose plan comes late, and once
through the whole policy, from images and joints to actions with some of them held. On a GPU, ticks
in steady state must not keep memory. An engine runs in a process of its own, so that one that
hangs or crashes is a line of the report like any other.

Ends with 0 if all is well, with 1 if an engine is wrong, with 2 if there is no such device.
`bench/latency.py --device cuda` has the times.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from engine_checks import engine_rows
from machine import describe_machine
from tqdm import tqdm


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
    parser.add_argument('--tiny', action='store_true', help='shrink the random model, for tests')
    parser.add_argument('--engine', help='check this one alone, in this process')
    parser.add_argument(
        '--limit', type=float, default=600.0, metavar='S', help='seconds that an engine may take'
    )
    parser.add_argument('--json', type=Path, help='write the result to this file as well')
    return parser.parse_args()


def rows_of(engine: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of an engine from a process of its own; the last one says how that ended, if badly."""
    command = [sys.executable, __file__, '--engine', engine, '--device', args.device]
    try:
        run = subprocess.run(
            [*command, *(['--tiny'] if args.tiny else [])],
            stdout=subprocess.PIPE,
            timeout=args.limit,
            text=True,
            check=False,
        )
        written = run.stdout
        ended = '' if run.returncode == 0 else f'its process ended with {run.returncode}'
    except subprocess.TimeoutExpired as expired:
        written = (expired.stdout or b'').decode()
        ended = f'it took longer than {args.limit:g} s'
    rows = [json.loads(line) for line in written.splitlines()]
    return [*rows, {'name': engine, 'ok': False, 'reason': ended}] if ended else rows


def write(file: Path | None, device: str, rows: list[dict[str, Any]]) -> None:
    """Write what is known so far."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        report = {'machine': describe_machine(device), 'rows': rows}
        file.write_text(json.dumps(report, indent=1) + '\n')


def main() -> int:
    """Check every engine; returns the exit status."""
    args = parse_arguments()
    if args.device == 'cuda' and not torch.cuda.is_available():
        print('gpu_check: a CUDA device expected, got none', file=sys.stderr)
        return 2
    if args.engine is not None:
        torch.set_num_threads(1)
        for row in engine_rows(args.engine, args.device, args.tiny):
            print(json.dumps(row), flush=True)
        return 0
    engines = ['eager', 'cuda' if args.device == 'cuda' else 'packed']
    rows: list[dict[str, Any]] = []
    for engine in tqdm(engines, unit='engine'):
        rows += rows_of(engine, args)
        write(args.json, args.device, rows)
    for row in rows:
        print(' '.join(f'{key} {value}' for key, value in row.items()))
    return 0 if all(row['ok'] for row in rows) else 1


if __name__ == '__main__':
    sys.exit(main())
