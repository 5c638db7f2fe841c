# SPDX-License-Identifier: Apache-2.0
"""Ordered control ticks of recorded episodes, as the pruner is trained and judged on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tts_policy.data.windows import Windows
from tts_policy.policy.engines.eager import MaskedLoop, denoise_dense
from tts_policy.policy.feature_cache import FeatureCache
from tts_policy.policy.network import PolicyNetwork
from tts_policy.policy.plan import dense_plan
from tts_policy.policy.sampler import SamplerSpec
from tts_policy.train.replicas import Replicas

KEPT_BACK = 24


@dataclass(frozen=True)
class TickSequence:
    """Observation features [R, To, Do] of R consecutive ticks and the seed of their held noise."""

    features: Tensor
    seed: int


@torch.no_grad()
def tick_sequences(
    network: PolicyNetwork,
    windows: Windows,
    count: int,
    ticks: int,
    generator: torch.Generator,
    execute: int | None = None,
    episodes: Sequence[Tensor] | None = None,
) -> list[TickSequence]:
    """Draw `count` sequences: `ticks` windows, `execute` frames apart.

    Every second one begins with its episode, as a live rollout does, the others anywhere in it.
    Of an episode that is too short there are fewer ticks; one of a single tick is left out, as the
    first tick is dense and teaches nothing. episodes: those to draw from, as indices of their
    windows, where it is not all of them.

    Raises
    ------
    ValueError
        if no episode has two ticks, or fewer are asked for.

    """
    stride = execute or network.contract.action.execute
    given = windows.episode_windows if episodes is None else episodes
    usable = [episode for episode in given if len(episode) > stride]
    if ticks < 2 or not usable:
        longest = max(map(len, given))
        raise ValueError(
            f'ticks: sequences of 2 or more, {stride} frames apart, expected, '
            f'got {ticks} of episodes of up to {longest} windows'
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
    """Draw `count` sequences, those to keep back and those to train on, of different episodes.

    The first quarter of the episodes, one at least, is kept back, and a quarter of the sequences,
    KEPT_BACK at most.

    Raises
    ------
    ValueError
        if fewer than two episodes have two ticks, or as `tick_sequences`.

    """
    stride = network.contract.action.execute
    usable = [episode for episode in windows.episode_windows if len(episode) > stride]
    if len(usable) < 2:
        raise ValueError(
            f'demonstrations: 2 or more episodes of more than {stride} windows expected beside '
            f'those held out, got {len(usable)}'
        )
    first, kept = max(1, len(usable) // 4), max(1, min(KEPT_BACK, count // 4))

    def draw(number: int, episodes: list[Tensor]) -> list[TickSequence]:
        return tick_sequences(network, windows, number, ticks, generator, episodes=episodes)

    return draw(kept, usable[:first]), draw(count - kept, usable[first:])


class DenseTeacher:
    """Dense actions of a frozen policy under held noise: the exact targets of its pruner."""

    def __init__(
        self, network: PolicyNetwork, spec: SamplerSpec, replicas: Replicas | None = None
    ) -> None:
        """Fold the tables of the network, which is on the device of the replicas already."""
        self.replicas = replicas or Replicas()
        self.denoiser, self.temperature = network.denoiser, spec.temperature
        self.scheduler = spec.scheduler.make()
        with torch.no_grad():
            self.conditioner = self.denoiser.conditioner(spec.scheduler.timesteps())

    def cache(self, seed: int) -> FeatureCache:
        """Fresh cache with the noise that `seed` gives."""
        spec, steps = self.denoiser.spec, self.scheduler.spec.steps
        noisy, device = self.scheduler.needs_noise, self.replicas.device
        cache = FeatureCache(spec, steps, noisy, device, temperature=self.temperature)
        cache.reset(torch.Generator().manual_seed(seed))
        return cache

    def noise(self, seed: int) -> tuple[Tensor, Tensor]:
        """Initial noise [1, T, A] and step noise [K, 1, T, A] that `seed` gives."""
        cache = self.cache(seed)
        return cache.initial_noise, cache.step_noise

    @torch.no_grad()
    def first_tick(self, sequence: TickSequence) -> FeatureCache:
        """FeatureCache after the dense first tick of a sequence."""
        cache = self.cache(sequence.seed)
        dense = dense_plan(cache.steps, cache.blocks)
        self.conditioner.encode(sequence.features[:1])
        MaskedLoop(self.denoiser, self.scheduler, self.conditioner, cache).run(dense)
        cache.commit(dense)
        return cache

    @torch.no_grad()
    def actions(self, sequence: TickSequence) -> Tensor:
        """Normalised dense actions [R, T, A]; all ticks are one batch, as they share the noise."""
        cache = self.cache(sequence.seed)
        self.conditioner.encode(sequence.features)
        return denoise_dense(self.denoiser, self.scheduler, self.conditioner, cache)
