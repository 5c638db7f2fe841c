# SPDX-License-Identifier: Apache-2.0
"""What a measurement was taken on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch


def _cpu_field(name: str) -> str:
    for line in Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines():
        key, _, value = line.partition(':')
        if key.strip() == name:
            return value.strip()
    return ''


def describe_machine(device: str) -> dict[str, Any]:
    """Device, versions and thread count, as they stand beside every figure."""
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
