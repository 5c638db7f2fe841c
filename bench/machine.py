# SPDX-License-Identifier: Apache-2.0
"""What a measurement was taken on and, on a GPU, with: every benchmark writes the former."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from tts_policy.policy.stopwatch import Stopwatch


def _cpu_field(name: str) -> str:
    for line in Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines():
        key, _, value = line.partition(':')
        if key.strip() == name:
            return value.strip()
    return ''


def describe_machine(device: str) -> dict[str, Any]:
    """Return device, versions, thread count and load, as they stand beside every figure."""
    machine: dict[str, Any] = {
        'device': device,
        'cpu': _cpu_field('model name'),
        'cpu_family_model': f'{_cpu_field("cpu family")}/{_cpu_field("model")}',
        'cores': os.cpu_count(),
        'threads': torch.get_num_threads(),
        'simd': torch.backends.cpu.get_cpu_capability(),
        'load_average': round(os.getloadavg()[0], 2),
        'python': platform.python_version(),
        'torch': torch.__version__,
    }
    if device.startswith('cuda'):
        machine['gpu'] = torch.cuda.get_device_name(device)
        machine['cuda'] = torch.version.cuda
    return machine


class DeviceStopwatch(Stopwatch):
    """Times the stages of a chunk by events of the main stream; nothing waits before `read`.

    Work on another stream, such as the pruner's, shows only where the main stream waits for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._marks: list[tuple[str, torch.cuda.Event]] = []
        self._mark('')

    def _mark(self, stage: str) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((stage, event))

    def lap(self, stage: str) -> None:
        """End a stage on the host and on the stream."""
        super().lap(stage)
        self._mark(stage)

    def read(self) -> dict[str, float]:
        """Seconds of every stage on the stream; waits for its end."""
        self._marks[-1][1].synchronize()
        return {
            stage: before.elapsed_time(after) * 1e-3
            for (_, before), (stage, after) in zip(self._marks, self._marks[1:], strict=False)
        }
