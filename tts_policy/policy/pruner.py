# SPDX-License-Identifier: Apache-2.0
"""Pruners: from the shared conditional memory to logits of a reuse plan.

They read the very memory that the decoder attends to (no second encoder). What depends on the
step alone is folded when a sampler is set up. `Pruner` is the one trained here: a tick costs two
small matrices on the observation tokens and one product per step, well under a thousandth of a
dense decoder. A table per sparsity serves the whole range with one pruner: which cells are worth
computing depends on how many may be.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from tts_policy.policy.denoisers.denoiser import DenoiserSpec
from tts_policy.policy.plan import Reuse, static_steps
from tts_policy.policy.validation import WRITTEN_IF_SET, Number, Size, Spec, checked


def _rising(sparsities: tuple[float, ...]) -> tuple[float, ...]:
    if sparsities != tuple(sorted(set(sparsities))):
        raise ValueError('sparsities that rise')
    return sparsities


_Sparsity = Annotated[Number, Field(ge=0.0, lt=1.0)]


@checked('pruner')
class PrunerSpec(Spec):
    """Sizes: K steps, N residual blocks, memory width D, To observation tokens, hidden width.

    sparsities: those that have a table of their own; others take the nearest one's.
    time_width: of the time tokens, None where it is that of the observation tokens.
    """

    steps: Size
    blocks: Size
    memory_width: Size
    obs_steps: Size
    sparsities: Annotated[tuple[_Sparsity, ...], Field(min_length=1), AfterValidator(_rising)]
    hidden: Size = 96
    time_width: Annotated[Size | None, WRITTEN_IF_SET] = None

    @staticmethod
    def of(
        denoiser: DenoiserSpec, steps: int, sparsities: tuple[float, ...], hidden: int = 96
    ) -> PrunerSpec:
        """Sizes that fit a denoiser sampled in so many steps."""
        memory_width, time_width = denoiser.memory_width, denoiser.time_width
        return PrunerSpec(
            steps,
            denoiser.blocks,
            memory_width,
            denoiser.obs_steps,
            sparsities,
            hidden,
            None if time_width == memory_width else time_width,
        )

    @property
    def flops(self) -> int:
        """FLOPs of the logits of one tick, those of the step alone left out."""
        observation = self.obs_steps * self.memory_width * self.hidden + self.hidden**2
        return 2 * observation + 2 * self.steps * self.hidden * self.blocks * len(Reuse)


class PlanPruner(nn.Module, ABC):
    """What a sampler needs of a pruner: `gates` when it is set up, a call per tick."""

    @property
    @abstractmethod
    def sparsities(self) -> tuple[float, ...]:
        """Those whose logits differ, all others having those of `trained_for`; empty: any may."""

    @property
    def reads_observation(self) -> bool:
        """Whether the observation has a say in the logits; a constant plan per sparsity if not."""
        return True

    def trained_for(self, sparsity: float) -> float:
        """Sparsity whose logits serve another: the nearest; of two as near, the sparser one."""
        # Rounded, for 0.95 - 0.94 and 0.94 - 0.93 are the same distance.
        return min(self.sparsities, key=lambda known: (round(abs(known - sparsity), 9), -known))

    @abstractmethod
    def gates(self, time_tokens: Tensor) -> Any:
        """What the logits need of the time tokens [K, .]; it depends on the steps alone."""

    @abstractmethod
    def forward(self, gates: Any, observation_tokens: Tensor, sparsity: float) -> Tensor:
        """Logits [B, K, N, 4] from gates and observation tokens [B, To, D], for a sparsity."""


class Pruner(PlanPruner):
    """logits[i, b] = table[i, b] + cell[b] (gate(time token i) * hidden(observation tokens))."""

    def __init__(self, spec: PrunerSpec) -> None:
        super().__init__()
        self.spec = spec
        classes = len(Reuse)
        self.observation = nn.Sequential(
            nn.Linear(spec.obs_steps * spec.memory_width, spec.hidden),
            nn.GELU(),
            nn.Linear(spec.hidden, spec.hidden),
        )
        self.gate = nn.Linear(spec.time_width or spec.memory_width, spec.hidden)
        self.tables = nn.Parameter(
            torch.zeros(len(spec.sparsities), spec.steps, spec.blocks, classes)
        )
        self.cell = nn.Parameter(torch.zeros(spec.hidden, spec.blocks * classes))

    @torch.no_grad()
    def start_from_static(self) -> None:
        """Set every table to prefer the static schedule of its sparsity, TIMESTEP elsewhere.

        Steps outside the schedule are ranked by the denser schedules they belong to, so that
        every sparsity has a sensible order.
        """
        steps = self.spec.steps
        rank = torch.zeros(steps)
        for n in range(1, steps):
            rank[torch.from_numpy(static_steps(steps, n))] += 1.0 / steps
        self.tables.zero_()
        for table, sparsity in zip(self.tables, self.spec.sparsities, strict=True):
            chosen = rank.clone()
            count = max(1, round((1 - sparsity) * steps))
            chosen[torch.from_numpy(static_steps(steps, count))] += 1.0
            table[..., Reuse.COMPUTE] = 2.0 * (chosen - 1.0)[:, None]
            table[..., Reuse.TIMESTEP] = 1.0
            table[..., Reuse.ROLLOUT] = 0.5

    def gates(self, time_tokens: Tensor) -> Tensor:
        """Gates [K, H] of the time tokens [K, .]; they depend on the step alone."""
        return self.gate(time_tokens)

    @property
    def sparsities(self) -> tuple[float, ...]:
        """Those that have a table of their own."""
        return self.spec.sparsities

    @property
    def reads_observation(self) -> bool:
        """Whether any cell listens to the observation."""
        return bool(self.cell.any())

    def table(self, sparsity: float) -> Tensor:
        """Table [K, N, 4] that serves a sparsity."""
        return self.tables[self.spec.sparsities.index(self.trained_for(sparsity))]

    def with_tables_of(self, other: Pruner) -> Pruner:
        """This pruner with the tables of another one for the sparsities that it has none for.

        Raises
        ------
        ValueError
            if they differ in size, or one reads the observation: its tables alone are not its
            plans.

        """
        sizes = [replace(pruner.spec, sparsities=(0.0,)) for pruner in (self, other)]
        if sizes[0] != sizes[1] or self.reads_observation or other.reads_observation:
            raise ValueError(
                'pruner: expected one of the same sizes with constant plans, got another'
            )
        known = sorted({*self.sparsities, *other.sparsities})
        joined = Pruner(replace(self.spec, sparsities=tuple(known)))
        state = {name: value for name, value in self.state_dict().items() if name != 'tables'}
        owners = [self if sparsity in self.sparsities else other for sparsity in known]
        tables = [pruner.table(s) for pruner, s in zip(owners, known, strict=True)]
        joined.load_state_dict(state | {'tables': torch.stack(tables).detach()})
        return joined

    def forward(self, gates: Tensor, observation_tokens: Tensor, sparsity: float) -> Tensor:
        """Logits [B, K, N, 4] from folded gates [K, H] and observation tokens [B, To, D]."""
        hidden = self.observation(observation_tokens.flatten(1))
        logits = (hidden[:, None] * gates) @ self.cell
        return logits.unflatten(-1, (self.spec.blocks, len(Reuse))) + self.table(sparsity)
