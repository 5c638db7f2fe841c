# SPDX-License-Identifier: Apache-2.0
"""Ordered ticks of recorded episodes, with the exact targets that a pruner is trained on.

The dense action under the same held noise is the target. (The paper's code compares with recorded
actions, which were drawn with other noise.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tts_policy.data.windows import Windows
from tts_policy.policy.engines.eager import MaskedLoop, denoise_dense
from tts_policy.policy.feature_cache import FeatureCache
from tts_policy.policy.network import PolicyNetwork
from tts_policy.policy.plan import Plan, dense_plan
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.train.replicas import Replicas

# Most sequences that validation needs.
KEPT_BACK = 24
# Share of the largest error of a joint in the error of a chunk.
PEAK_WEIGHT = 0.2


@dataclass(frozen=True)
class TickSequence:
    """Observation features [R, To, Do] of R consecutive ticks and the seed of their held noise."""

    features: Tensor
    seed: int


@dataclass(frozen=True)
class TrainingSequence:
    """A sequence with its targets, and the features of its dense first tick.

    target: normalised dense actions [R, T, A]; first_tick: [K, N, 1, T, D]. Both depend only on
    the frozen policy and the held noise, so they are computed once.
    """

    sequence: TickSequence
    target: Tensor
    first_tick: Tensor


@torch.no_grad()
def tick_sequences(
    network: PolicyNetwork,
    windows: Windows,
    count: int,
    ticks: int,
    generator: torch.Generator,
    episodes: Sequence[Tensor] | None = None,
) -> list[TickSequence]:
    """Draw `count` sequences of `ticks` windows, as far apart as a chunk executes actions.

    Every second sequence begins with its episode, as a live rollout does; the others begin
    anywhere. A short episode gives fewer ticks. One of a single tick is left out, since the first
    tick is dense. episodes: those to draw from, as indices of their windows; by default all.

    Raises
    ------
    ValueError
        if no episode has two ticks, or fewer are asked for.

    """
    stride = network.contract.action.execute
    given = windows.episode_windows if episodes is None else episodes
    usable = [episode for episode in given if len(episode) > stride]
    if ticks < 2 or not usable:
        longest = max(map(len, given))
        raise ValueError(
            f'ticks: expected sequences of 2 or more, {stride} frames apart, got {ticks} of '
            f'episodes of up to {longest} windows'
        )
    device, sequences = network.denoiser.device, []
    for number in range(count):
        episode = usable[int(torch.randint(len(usable), (), generator=generator))]
        length = min(ticks, 1 + (len(episode) - 1) // stride)
        slack = len(episode) - (length - 1) * stride
        start = int(torch.randint(slack, (), generator=generator)) if number % 2 else 0
        index = episode[start + stride * torch.arange(length)]
        images, joints, _ = windows.gather(index)
        images, joints = {k: v.to(device) for k, v in images.items()}, joints.to(device)
        seed = int(torch.randint(1 << 31, (), generator=generator))
        sequences.append(TickSequence(network.features(images, joints), seed))
    return sequences


def split_sequences(
    network: PolicyNetwork, windows: Windows, count: int, ticks: int, generator: torch.Generator
) -> tuple[list[TickSequence], list[TickSequence]]:
    """Draw `count` sequences; return those for validation and those to train on.

    The two come from different episodes: validation takes the first quarter of them, at least
    one, and a quarter of the sequences, at most KEPT_BACK.

    Raises
    ------
    ValueError
        if fewer than two episodes have two ticks, or as `tick_sequences`.

    """
    stride = network.contract.action.execute
    usable = [episode for episode in windows.episode_windows if len(episode) > stride]
    if len(usable) < 2:
        raise ValueError(
            f'demonstrations: expected 2 or more episodes of more than {stride} windows besides '
            f'those held out, got {len(usable)}'
        )
    first, kept = max(1, len(usable) // 4), max(1, min(KEPT_BACK, count // 4))

    def draw(number: int, episodes: list[Tensor]) -> list[TickSequence]:
        return tick_sequences(network, windows, number, ticks, generator, episodes)

    return draw(kept, usable[:first]), draw(count - kept, usable[first:])


class DenseTeacher:
    """The frozen policy under held noise: it gives a pruner's targets and runs its plans."""

    def __init__(
        self, network: PolicyNetwork, spec: SamplerSpec, replicas: Replicas | None = None
    ) -> None:
        """Fold the tables of the network, which is on the device of the replicas already."""
        self.replicas = replicas or Replicas()
        self.denoiser, self.temperature = network.denoiser, spec.temperature
        self.kinds = self.denoiser.spec.stack.kinds
        self.scheduler = spec.scheduler.make()
        with torch.no_grad():
            self.conditioner = self.denoiser.conditioner(spec.scheduler.timesteps())

    def empty_cache(self, batch: int = 1) -> FeatureCache:
        """Return a cache for sequences side by side, without features and noise."""
        steps, noisy = self.scheduler.spec.steps, self.scheduler.needs_noise
        device, spec = self.replicas.device, self.denoiser.spec
        return FeatureCache(spec, steps, noisy, device, self.temperature, batch)

    def cache(self, seed: int) -> FeatureCache:
        """Return a fresh cache with the noise that `seed` gives."""
        cache = self.empty_cache()
        cache.reset(torch.Generator().manual_seed(seed))
        return cache

    def loop(self, cache: FeatureCache) -> MaskedLoop:
        """Return the denoising loop of one tick, whose observation is encoded already."""
        return MaskedLoop(self.denoiser, self.scheduler, self.conditioner, cache)

    @torch.no_grad()
    def first_tick(self, sequence: TickSequence) -> FeatureCache:
        """Return the cache after the dense first tick of a sequence."""
        cache = self.cache(sequence.seed)
        dense = dense_plan(cache.steps, cache.blocks)
        self.conditioner.encode(sequence.features[:1])
        self.loop(cache).run(dense)
        cache.commit(dense)
        return cache

    @torch.no_grad()
    def actions(self, sequence: TickSequence) -> Tensor:
        """Return normalised dense actions [R, T, A]; ticks are one batch, as they share noise."""
        cache = self.cache(sequence.seed)
        self.conditioner.encode(sequence.features)
        return denoise_dense(self.denoiser, self.scheduler, self.conditioner, cache)

    def with_targets(self, sequences: Sequence[TickSequence]) -> list[TrainingSequence]:
        """Return the sequences with their targets, behind a progress bar."""
        others = not self.replicas.is_first
        bar = tqdm(sequences, desc='dense targets', unit='episode', mininterval=5, disable=others)
        return [TrainingSequence(s, self.actions(s), self.first_tick(s).features) for s in bar]


class SequenceBatch:
    """Sequences side by side, cut to the ticks that all of them have; a process holds its share.

    count: sequences of all shares; size: of this one. An empty share holds one as a placeholder.
    initial_noise: [B, T, A]; step_noise: [K, B, T, A], empty for a scheduler that adds none;
    observations: [R, B, To, Do]; targets: [R, B, T, A]; first_tick: [K, N, B, T, D].
    """

    def __init__(self, teacher: DenseTeacher, sequences: Sequence[TrainingSequence]) -> None:
        self._teacher = teacher
        self.ticks = min(len(each.target) for each in sequences)
        share = teacher.replicas.share(sequences)
        self.count, self.size = len(sequences), len(share)
        held = share or sequences[:1]
        caches = [teacher.cache(each.sequence.seed) for each in held]
        self.initial_noise = torch.cat([cache.initial_noise for cache in caches])
        self.step_noise = torch.cat([cache.step_noise for cache in caches], dim=1)
        observations = [each.sequence.features[: self.ticks] for each in held]
        self.observations = torch.stack(observations, dim=1)
        self.targets = torch.stack([each.target[: self.ticks] for each in held], dim=1)
        self.first_tick = torch.cat([each.first_tick for each in held], dim=2)

    def cache(self) -> FeatureCache:
        """Return the cache of all sequences after their dense first tick."""
        cache = self._teacher.empty_cache(len(self.initial_noise))
        cache.initial_noise.copy_(self.initial_noise)
        cache.step_noise.copy_(self.step_noise)
        cache.features.copy_(self.first_tick)
        return cache


@dataclass(frozen=True)
class ActionError:
    """L1 error of chunks in normalised action units, over the part that is executed.

    It is half of the absolute error, plus all of the error of the mean over time: the robot
    filters what changes from one set-point to the next, but not an offset of the whole chunk, and
    offsets make a gripper miss its object. The largest error of each joint has a share too: a plan
    may otherwise be right on average and jump at one set-point.
    """

    first: int
    execute: int

    def __call__(self, actions: Tensor, target: Tensor) -> Tensor:
        """Return the errors [B] of actions [B, T, A]."""
        error = (actions - target)[:, self.first : self.first + self.execute]
        size = error.abs()
        offset, peak = error.mean(dim=1).abs(), size.amax(dim=1)
        return (offset + 0.5 * size.mean(dim=1) + PEAK_WEIGHT * peak).mean(dim=-1)


class PlanErrors:
    """Measures the errors of plans; the sequences of a batch all follow the same plan."""

    def __init__(self, teacher: DenseTeacher, measure: ActionError) -> None:
        self.teacher, self.measure, self.kinds = teacher, measure, teacher.kinds

    @torch.no_grad()
    def tick(self, batch: SequenceBatch, tick: int, plan: Plan, cache: FeatureCache) -> Tensor:
        """Run one tick by a plan on a cache; return actions [B, T, A]."""
        self.teacher.conditioner.encode(batch.observations[tick])
        return self.teacher.loop(cache).run(plan)

    def of_sequences(self, batch: SequenceBatch, plan: Plan) -> Tensor:
        """Return the error of a plan in every sequence, over the ticks after the first."""
        cache = batch.cache()
        errors = [
            self.measure(self.tick(batch, tick, plan, cache), batch.targets[tick])
            for tick in range(1, batch.ticks)
        ]
        own = torch.stack(errors).mean(dim=0)[: batch.size]
        return self.teacher.replicas.gathered(own, batch.count).cpu()

    def mean(self, batch: SequenceBatch, plan: Plan) -> float:
        """Return the mean error of a plan over sequences and ticks."""
        return float(self.of_sequences(batch, plan).mean())


class SequenceChoice:
    """Draws the sequences of a search step; those with large errors come more often.

    Most ticks of a recording are easy: the robot goes on as before, and any plan is right. A plan
    must be right where the action depends on details, and these ticks show by their error.
    `preference` is the share of the draws that follows the error. errors: [M] of every sequence,
    None before the first `measure`, when all are equally likely.
    """

    def __init__(
        self, teacher: DenseTeacher, sequences: Sequence[TrainingSequence], preference: float
    ) -> None:
        if not 0.0 <= preference <= 1.0:
            raise ValueError(f'preference: expected a share in [0, 1], got {preference}')
        self.sequences, self._teacher, self._preference = sequences, teacher, preference
        self.errors: Tensor | None = None

    def measure(self, errors: PlanErrors, plan: Plan, size: int) -> None:
        """Measure the error of a plan in every sequence, `size` of them at a time."""
        if self._preference:
            parts = [self.sequences[i : i + size] for i in range(0, len(self.sequences), size)]
            batches = (SequenceBatch(self._teacher, part) for part in parts)
            self.errors = torch.cat([errors.of_sequences(batch, plan) for batch in batches])

    def draw(self, random: np.random.Generator, count: int) -> list[TrainingSequence]:
        """Draw `count` different sequences, or all of them if there are fewer."""
        count = min(count, len(self.sequences))
        chances = np.full(len(self.sequences), 1 / len(self.sequences))
        if self.errors is not None and self.errors.any():
            # A sequence without an error is drawn only where there are too few others.
            errors = self.errors.double().numpy().clip(1e-9 * float(self.errors.max()))
            chances += self._preference * (errors / errors.sum() - chances)
        chosen = random.choice(len(self.sequences), count, replace=False, p=chances)
        return [self.sequences[index] for index in chosen]
