# SPDX-License-Identifier: Apache-2.0
"""Which engine runs a denoiser: the fastest that its device and architecture allow."""

from __future__ import annotations

from tts_policy.core.cpu_engine import CpuEngine
from tts_policy.core.denoiser import Denoiser
from tts_policy.core.engine import EagerEngine, Engine
from tts_policy.core.lattice import Lattice
from tts_policy.core.scheduler import NoiseScheduler


def make_engine(
    denoiser: Denoiser, scheduler: NoiseScheduler, lattice: Lattice, force_first_step: bool
) -> Engine:
    """Engine for the device that the lattice is on; eager where no faster one fits."""
    if lattice.store.device.type == 'cpu' and CpuEngine.supports(denoiser):
        return CpuEngine(denoiser, scheduler, lattice, force_first_step)
    return EagerEngine(denoiser, scheduler, lattice, force_first_step)
