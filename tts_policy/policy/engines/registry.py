# SPDX-License-Identifier: Apache-2.0
"""Which engine runs a denoiser: by default the fastest that was verified on its device."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec

import torch

from tts_policy.policy.denoisers.denoiser import Denoiser
from tts_policy.policy.denoisers.memory_table import MemoryTable
from tts_policy.policy.denoisers.transformer import TransformerDenoiser
from tts_policy.policy.engines.cpu import CpuEngine
from tts_policy.policy.engines.eager import EagerEngine, Engine
from tts_policy.policy.engines.graph_engine import GraphEngine
from tts_policy.policy.feature_cache import FeatureCache
from tts_policy.policy.scheduler import NoiseScheduler

EngineMaker = Callable[[Denoiser, NoiseScheduler, FeatureCache, bool], Engine]


def make_eager(
    denoiser: Denoiser, scheduler: NoiseScheduler, cache: FeatureCache, force_first_step: bool
) -> Engine:
    """Make the reference, on any device."""
    return EagerEngine(denoiser, scheduler, cache, force_first_step)


def make_packed(
    denoiser: Denoiser, scheduler: NoiseScheduler, cache: FeatureCache, force_first_step: bool
) -> Engine:
    """Make the engine of packed blocks; raises ValueError where it cannot run the denoiser."""
    if cache.store.device.type != 'cpu':
        raise ValueError(f"engine 'packed' needs a CPU, got {cache.store.device}")
    if not CpuEngine.supports(denoiser):
        raise ValueError(
            "engine 'packed' needs a transformer denoiser without attention between condition "
            f'tokens, got {type(denoiser).__name__}'
        )
    return CpuEngine(denoiser, scheduler, cache, force_first_step)


def make_graphs(
    denoiser: Denoiser, scheduler: NoiseScheduler, cache: FeatureCache, force_first_step: bool
) -> Engine:
    """Make the engine of captured graphs; on a CPU it calls what it would capture."""
    table = None
    if isinstance(denoiser, TransformerDenoiser):
        table = MemoryTable(denoiser, scheduler.spec.timesteps())
    return GraphEngine(denoiser, scheduler, cache, force_first_step, table)


def make_triton(
    denoiser: Denoiser, scheduler: NoiseScheduler, cache: FeatureCache, force_first_step: bool
) -> Engine:
    """Make the engine of the persistent kernel, weights in half precision on a GPU.

    Raises ValueError where triton is not installed, on a CPU without the interpreter, on a GPU
    with it, or where the kernel cannot run the denoiser.
    """
    if find_spec('triton') is None:
        raise ValueError("engine 'triton' needs triton (requirements/triton.txt)")
    interpreted = os.environ.get('TRITON_INTERPRET', '').lower() in ('1', 'true', 'yes', 'on', 'y')
    if cache.store.is_cuda == interpreted:
        needed = 'a GPU, or TRITON_INTERPRET=1 on a CPU'
        got = f'{cache.store.device} {"with" if interpreted else "without"} the interpreter'
        raise ValueError(f"engine 'triton' needs {needed}, got {got}")
    from tts_policy.policy.engines.triton_engine import TritonEngine

    dtype = torch.float16 if cache.store.is_cuda else torch.float32
    return TritonEngine(denoiser, scheduler, cache, force_first_step, dtype=dtype)


def make_engine(
    denoiser: Denoiser, scheduler: NoiseScheduler, cache: FeatureCache, force_first_step: bool
) -> Engine:
    """Make the fastest engine that was verified on the cache's device: packed, or eager."""
    if cache.store.device.type == 'cpu' and CpuEngine.supports(denoiser):
        return CpuEngine(denoiser, scheduler, cache, force_first_step)
    return EagerEngine(denoiser, scheduler, cache, force_first_step)


# Engines whose ticks replay what was captured, the camera encoder too.
CAPTURING = ('graphs', 'triton')
ENGINES: dict[str, EngineMaker] = {
    'auto': make_engine,
    'eager': make_eager,
    'packed': make_packed,
    'graphs': make_graphs,
    'triton': make_triton,
}


def engine_maker(name: str) -> EngineMaker:
    """Maker of the engine of a name; raises ValueError if there is none."""
    if name not in ENGINES:
        raise ValueError(f'engine must be one of {", ".join(ENGINES)}, got {name!r}')
    return ENGINES[name]
