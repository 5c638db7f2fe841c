# SPDX-License-Identifier: Apache-2.0
"""What one process of an evaluation does: run episodes, and compare actions with dense ones.

A measurement depends on its task, variant and seed alone, so neither the order nor the number of
processes matters. Costs are counted from the plans that were executed.
"""

from __future__ import annotations

import platform
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tts_policy.evaluate.digest import VariantDigests
from tts_policy.evaluate.plan_sources import PlanSource
from tts_policy.evaluate.variants import NOISE, Setting, Variant
from tts_policy.policy.bundle import Bundle, load_bundle
from tts_policy.policy.contract import PolicyContract
from tts_policy.policy.denoisers.denoiser import DenoiserSpec
from tts_policy.policy.plan import Plan, Reuse, reuse_mix
from tts_policy.policy.policy import Chunk, TestTimeSparsePolicy
from tts_policy.sim.task import EXPERT_SEED, Window
from tts_policy.sim.tasks import task_named

KEPT_POLICIES = 3
Made = TypeVar('Made')


@dataclass(frozen=True)
class Job:
    """Episode of `seed`, or the action error on other sequences where there is no seed."""

    task: str
    variant: Variant
    seed: int | None = None

    @property
    def key(self) -> tuple[str, str, int | None]:
        """What names the measurement in the log."""
        return self.task, self.variant.name, self.seed


@dataclass(frozen=True)
class VariantPolicy:
    """A policy set up for a variant."""

    variant: Variant
    setting: Setting
    policy: TestTimeSparsePolicy
    source: PlanSource | None
    denoiser: DenoiserSpec

    def reset(self, seed: int) -> None:
        """Start an episode; the noise is that of every other variant."""
        self.policy.reset(seed)
        if self.source is not None:
            self.source.begin(seed)

    def act(self, window: Window) -> Chunk:
        """Chunk of one tick."""
        return self.policy.act(window, self.variant.asked_sparsity)


class Worker:
    """Bundles, worlds and policies of one process, made when first needed."""

    def __init__(self, bundles: dict[str, Path], sequences: int) -> None:
        torch.set_num_threads(1)
        self._bundles, self._sequences = bundles, sequences
        self._made: dict[Hashable, Any] = {}
        self._policies: OrderedDict[tuple[str, str], VariantPolicy] = OrderedDict()

    def run(self, job: Job) -> dict[str, Any]:
        """Measurement of a job, as it stands in the log."""
        record: dict[str, Any] = {'task': job.task, 'variant': job.variant.name, 'seed': job.seed}
        record['digest'] = self._digests(job.task).of(job.variant)
        if job.seed is None:
            return record | {'l1_error': self._action_error(job.task, job.variant)}
        return record | self._episode(job.task, job.variant, job.seed)

    def steady_ticks(self, task: str) -> int:
        """How many ticks the other episodes have without their first ones."""
        return sum(len(windows) - 1 for windows in self._other_windows(task))

    def turns(self, task: str, variants: Sequence[Variant]) -> Iterator[dict[str, float]]:
        """Latency [ms] of every variant at a tick, tick after tick of the other episodes.

        The variants take turns, so whatever slows the machine slows all of them alike. The first
        tick of an episode is dense; it is run but not reported.
        """
        made = {variant.name: self._made_policy(task, variant) for variant in variants}
        for number, windows in enumerate(self._other_windows(task)):
            for ready in made.values():
                ready.reset(EXPERT_SEED + number)
            for tick, window in enumerate(windows):
                turn = {
                    name: 1e3 * ready.act(window).stats.latency_s for name, ready in made.items()
                }
                if tick:
                    yield turn

    def close(self) -> None:
        """Free the renderers of its worlds.

        A renderer that is only forgotten is freed in the context of another one that is in use.
        """
        for task in self._bundles:
            task_named(task).close()

    def _once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _bundle(self, task: str) -> Bundle:
        return self._once(('bundle', task), lambda: load_bundle(self._bundles[task]))

    def _digests(self, task: str) -> VariantDigests:
        return self._once(('digests', task), lambda: VariantDigests(self._bundle(task)))

    def _policy(self, task: str, variant: Variant) -> VariantPolicy:
        key = task, variant.name
        if key not in self._policies:
            self._policies[key] = self._made_policy(task, variant)
            # A policy of many steps owns tens of megabytes of cache.
            while len(self._policies) > KEPT_POLICIES:
                self._policies.popitem(last=False)
        return self._policies[key]

    def _made_policy(self, task: str, variant: Variant) -> VariantPolicy:
        bundle = self._bundle(task)
        setting = variant.setting(bundle)
        source = variant.plan_source(
            bundle, self._tokens(task) if variant.plan else torch.empty(0)
        )
        samplers = {variant.name: (setting.sampler, source)}
        policy = TestTimeSparsePolicy(replace(bundle, samplers=samplers), variant.name)
        return VariantPolicy(variant, setting, policy, source, bundle.network.denoiser.spec)

    def _episode(self, task: str, variant: Variant, seed: int) -> dict[str, Any]:
        ready = self._policy(task, variant)
        execute = ready.setting.execute
        ready.reset(seed)
        rollout = task_named(task).run(
            ready.policy, seed, variant.asked_sparsity, execute, ready.setting.blind
        )
        plans = [chunk.plan for chunk in rollout.chunks]
        first, *steady = plans
        return {
            'success': rollout.success,
            **({} if rollout.score is None else {'score': round(rollout.score, 4)}),
            'duration_s': round(rollout.duration_s, 3),
            'ticks': len(plans),
            'latency_ms': [round(1e3 * c.stats.latency_s, 2) for c in rollout.chunks],
            'gflops': [self._gflops(ready, plan, tick) for tick, plan in enumerate(plans)],
            'fe': [_forward_equivalents(plan) for plan in plans],
            'mix': reuse_mix(np.stack(steady or [first])),
            'oldest': max(chunk.stats.oldest_rollout_ticks for chunk in rollout.chunks),
            'device': processor(),
            'observation_gflops': self._observation_gflops(task),
        }

    @staticmethod
    def _gflops(ready: VariantPolicy, plan: Plan, tick: int) -> float:
        """Cost of a tick but for the observation encoder; the first tick asks for no plan."""
        spec = ready.denoiser
        planning = ready.source.flops if ready.source is not None and tick else 0
        encoder = spec.conditioner_flops(len(plan))
        return round(1e-9 * (encoder + planning + spec.decoder_flops(plan)), 6)

    def _other_windows(self, task: str, execute: int = 0) -> list[list[Window]]:
        """Windows of the ticks of other episodes, `execute` frames apart (0: the contract's)."""
        bundle = self._bundle(task)
        stride = execute or bundle.network.contract.action.execute
        return task_named(task).windows(bundle, self._sequences, stride)

    def _tokens(self, task: str) -> Tensor:
        """Observation tokens [M, To, D] of the ticks of other episodes."""
        return self._once(('tokens', task), lambda: self._encode(task))

    @torch.inference_mode()
    def _encode(self, task: str) -> Tensor:
        network = self._bundle(task).network.eval()
        tokens = []
        for window in (w for episode in self._other_windows(task) for w in episode):
            features = network.features(*_as_tensors(network.contract, window))
            tokens.append(network.denoiser.observation_tokens(features))
        return torch.cat(tokens)

    def _observation_gflops(self, task: str) -> float:
        def count() -> float:
            network = self._bundle(task).network
            window = self._other_windows(task)[0][0]
            tensors = _as_tensors(network.contract, window)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                network.features(*tensors)
            return round(1e-9 * counter.get_total_flops(), 6)

        return self._once(('observation', task), count)

    def _action_error(self, task: str, variant: Variant) -> float | None:
        """Mean L1 error (normalised) of ticks 1 and later against dense of the same noise."""
        if not variant.plan:
            return None
        setting = self._policy(task, variant).setting
        noise = tuple(option for option in variant.options if option in NOISE)
        dense = Variant(
            variant.scheduler, variant.steps, options=(*noise, f'execute{setting.execute}')
        )
        expected = self._once(('dense', task, dense.name), lambda: self._actions(task, dense))
        scale = self._bundle(task).network.action_normalizer.scale.numpy()
        errors = [
            np.abs((actions - target)[1:] * scale).mean(axis=(1, 2))
            for actions, target in zip(self._actions(task, variant), expected, strict=True)
        ]
        return float(np.concatenate(errors).mean())

    def _actions(self, task: str, variant: Variant) -> list[NDArray[np.float64]]:
        """Chunks [R, T - To + 1, A] of a variant on the windows of every other episode."""
        ready, chunks = self._policy(task, variant), []
        episodes = self._other_windows(task, ready.setting.execute)
        for number, windows in enumerate(episodes):
            ready.reset(EXPERT_SEED + number)
            chunks.append(np.stack([ready.act(window).actions for window in windows]))
        return chunks


def _as_tensors(contract: PolicyContract, window: Window) -> tuple[dict[str, Tensor], Tensor]:
    """Images [1, To, H, W, 3] by camera and joints [1, To, J] of a window."""
    keys = [camera.key for camera in contract.observation.cameras]
    images = {key: torch.from_numpy(window[key])[None] for key in keys}
    return images, torch.from_numpy(window['joints']).float()[None]


@cache
def processor() -> str:
    """Name of the processor, as Linux tells it."""
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def _forward_equivalents(plan: Plan) -> float:
    """Cost of a plan in dense forward passes: computed cells over blocks."""
    return round(float((plan == Reuse.COMPUTE).sum() / plan.shape[1]), 4)


_worker: Worker | None = None


def start_worker(bundles: dict[str, Path], sequences: int) -> None:
    """Set up a process of the pool."""
    global _worker
    _worker = Worker(bundles, sequences)


def stop_worker() -> None:
    """Free what `start_worker` has set up in this process."""
    global _worker
    if _worker is not None:
        _worker.close()
        _worker = None


def run_job(job: Job) -> dict[str, Any]:
    """Run a job in a process that `start_worker` has set up."""
    assert _worker is not None
    return _worker.run(job)
