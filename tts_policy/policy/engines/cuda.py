# SPDX-License-Identifier: Apache-2.0
"""The eager loop captured as CUDA graphs, one for every plan. Not yet measured on a GPU.

A graph repeats the work that was captured, on the same memory. What changes from tick to tick
must therefore stand in static buffers: the observation features, the noise (in the feature cache),
the known actions, and the noisy and clean actions, which are in and out. A tick replays three
graphs: the conditional encoder, step 0 if it is forced (the pruner runs beside it), and the other
steps of the plan. A plan without a graph runs through the same functions, uncaptured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from tts_policy.policy.denoisers.denoiser import Denoiser
from tts_policy.policy.engines.eager import MaskedLoop
from tts_policy.policy.engines.engine import Engine
from tts_policy.policy.feature_cache import FeatureCache
from tts_policy.policy.inpainting import Inpainting
from tts_policy.policy.plan import Plan, dense_plan
from tts_policy.policy.schedulers.scheduler import Scheduler
from tts_policy.policy.stopwatch import Stopwatch

Run = Callable[[], None]
# A graph of masked steps is for the bytes of a plan, with actions held or without.
Key = tuple[bytes, bool]
WARM_UP = 2
# Plans that differ at every tick, as a pruner that reads the observation may ask for, would fill
# the memory of the device with graphs.
MAX_GRAPHS = 64


class GraphCapture:
    """Captures functions on one CUDA device as graphs that share one memory pool.

    Graphs of one pool must run one after another. What a captured function makes and keeps stays
    at its place as long as Python refers to it, and is overwritten by every replay.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Run) -> Run:
        """Call a function for warm-up, capture it and return the replay of the graph."""
        torch.cuda.synchronize(self._stream.device)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP):
                function()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device in the meantime.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode='thread_local'
        ):
            function()
        replay: Run = graph.replay
        return replay


class CudaEngine(Engine):
    """Replays one captured graph per plan; results live in its buffers until the next tick."""

    @staticmethod
    def unsupported(denoiser: Denoiser, device: torch.device) -> str:
        """Say why the engine cannot run a denoiser on a device; empty if it can."""
        return '' if device.type == 'cuda' else f'expected a CUDA device, got {device}'

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: Scheduler,
        cache: FeatureCache,
        force_first_step: bool,
        capture: Callable[[Run], Run] | None = None,
    ) -> None:
        """Allocate the buffers and capture what no plan changes.

        capture: makes the replay of a function; by default a `GraphCapture`.
        """
        spec, device = denoiser.spec, cache.store.device
        self._denoiser, self._scheduler, self._cache = denoiser, scheduler, cache
        self._conditioner = denoiser.conditioner(scheduler.spec.timesteps())
        self.time_tokens = self._conditioner.time_tokens
        self._features = torch.zeros(1, spec.obs_steps, spec.obs_features, device=device)
        self._x, self._x0 = (torch.zeros_like(cache.initial_noise) for _ in range(2))
        levels = torch.zeros(cache.steps + 1, spec.horizon, spec.action_dim, device=device)
        self._held = Inpainting(levels, torch.zeros(spec.horizon, 1, device=device))
        self._first = int(force_first_step)
        self._capture = capture or GraphCapture(device)
        self._graphs: dict[Key, Run] = {}
        self._uncaptured: dict[Key, Plan] = {}
        self._encode = self._captured(self.encode)
        self.observation_tokens = self._conditioner.observation_tokens
        dense = dense_plan(cache.steps, cache.blocks)
        self._first_step = {
            held: self._captured(partial(self.run_steps, dense, 0, 1, held))
            for held in (False, True)
            if force_first_step
        }
        self.prepare([dense])

    def encode(self) -> None:
        """Encode the observation features that stand in the buffer."""
        self._conditioner.encode(self._features)

    def run_steps(self, plan: Plan, first: int, last: int, held: bool) -> None:
        """Run steps `first` to `last` - 1 of a plan on the buffers; held: with known actions."""
        loop = MaskedLoop(
            self._denoiser,
            self._scheduler,
            self._conditioner,
            self._cache,
            self._held if held else None,
            (self._x, self._x0) if first else None,
        )
        self._x.copy_(loop.run(plan, first, last))
        if loop.x0 is not None:
            self._x0.copy_(loop.x0)

    def prepare(self, plans: Iterable[Plan] = ()) -> None:
        """Capture these plans, and those that ran without a graph since the last call."""
        asked: dict[Key, Plan] = {(plan.tobytes(), False): plan for plan in plans}
        for (key, held), plan in {**asked, **self._uncaptured}.items():
            if (key, held) not in self._graphs and len(self._graphs) < MAX_GRAPHS:
                run = partial(self.run_steps, plan, self._first, self._cache.steps, held)
                self._graphs[key, held] = self._captured(run)
        self._uncaptured.clear()

    def _captured(self, function: Run) -> Run:
        # Warming up computes cells; the cache must not remember it.
        store = self._cache.store.clone()
        replay = self._capture(function)
        self._cache.store.copy_(store)
        return replay

    def observe(self, features: Tensor) -> None:
        """Encode the observation features [1, To, Do] of a tick."""
        self._features.copy_(features, non_blocking=True)
        self._encode()
        self.observation_tokens = self._conditioner.observation_tokens

    def denoise(
        self, plan: Callable[[], Plan], watch: Stopwatch, inpainting: Inpainting | None = None
    ) -> tuple[Tensor, Plan]:
        """Denoise by a plan; see `Engine.denoise`."""
        held = inpainting is not None
        if inpainting is not None:
            self._held.levels.copy_(inpainting.levels)
            self._held.weights.copy_(inpainting.weights)
        if self._first_step:
            self._first_step[held]()
        watch.lap('first_step')
        executed = plan()
        watch.lap('plan')
        key = executed.tobytes(), held
        if key in self._graphs:
            self._graphs[key]()
        else:
            if len(self._uncaptured) < MAX_GRAPHS:
                self._uncaptured[key] = executed.copy()
            self.run_steps(executed, self._first, self._cache.steps, held)
        watch.lap('masked_steps')
        return self._x, executed
