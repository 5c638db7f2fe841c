# SPDX-License-Identifier: Apache-2.0
"""The engines by name, and which of them runs a denoiser on a device."""

from __future__ import annotations

import torch

from tts_policy.policy.denoisers.denoiser import Denoiser
from tts_policy.policy.engines.cuda import CudaEngine
from tts_policy.policy.engines.eager import EagerEngine
from tts_policy.policy.engines.engine import Engine
from tts_policy.policy.engines.packed import PackedEngine

AUTO = 'auto'
ENGINES: dict[str, type[Engine]] = {
    'eager': EagerEngine,
    'packed': PackedEngine,
    'cuda': CudaEngine,
}


def find_engine(name: str, denoiser: Denoiser, device: torch.device) -> type[Engine]:
    """Engine of a name for a denoiser on a device.

    `auto` is `packed` where that engine supports the denoiser, and `eager` elsewhere: on a GPU
    too, until `cuda` has been measured on one.

    Raises
    ------
    ValueError
        if there is no such engine, or it does not support the denoiser or the device.

    """
    if name == AUTO:
        return EagerEngine if PackedEngine.unsupported(denoiser, device) else PackedEngine
    if name not in ENGINES:
        raise ValueError(f'engine: expected one of {", ".join((AUTO, *ENGINES))}, got {name!r}')
    if reason := ENGINES[name].unsupported(denoiser, device):
        raise ValueError(f'engine {name!r}: {reason}')
    return ENGINES[name]
