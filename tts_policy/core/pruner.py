# SPDX-License-Identifier: Apache-2.0
"""The pruner: from the shared conditional memory to logits of a reuse plan.

It reads the very memory that the decoder attends to (no second encoder). What depends on the
step alone, its gate of the time token, is folded when a sampler is set up; a tick costs two small
matrices on the observation tokens and one product per step, well under a thousandth of a dense
decoder.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tts_policy.core.plan import Reuse, static_steps


@dataclass(frozen=True)
class PrunerSpec:
    """Sizes: K steps, N residual blocks, memory width D, To observation tokens, hidden width."""

    steps: int
    blocks: int
    memory_width: int
    obs_steps: int
    hidden: int = 96

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as they stand in model.yaml."""
        return asdict(self)


class Pruner(nn.Module):
    """logits[i, b] = bias[i, b] + cell[b] (gate(time token i) * hidden(observation tokens))."""

    def __init__(self, spec: PrunerSpec) -> None:
        super().__init__()
        self.spec = spec
        classes = len(Reuse)
        self.observation = nn.Sequential(
            nn.Linear(spec.obs_steps * spec.memory_width, spec.hidden),
            nn.GELU(),
            nn.Linear(spec.hidden, spec.hidden),
        )
        self.gate = nn.Linear(spec.memory_width, spec.hidden)
        self.bias = nn.Parameter(torch.zeros(spec.steps, spec.blocks, classes))
        self.cell = nn.Parameter(torch.zeros(spec.hidden, spec.blocks * classes))
        nn.init.normal_(self.cell, std=0.02)

    @torch.no_grad()
    def start_from_static(self, count: int, scale: float = 2.0) -> None:
        """Set the bias to prefer the static schedule of `count` steps, and TIMESTEP elsewhere.

        Steps outside the schedule are ranked by the denser schedules they belong to, so that
        every sparsity starts from a sensible order.
        """
        steps = self.spec.steps
        rank = torch.zeros(steps)
        for n in range(1, steps):
            rank[torch.from_numpy(static_steps(steps, n))] += 1.0 / steps
        rank[torch.from_numpy(static_steps(steps, count))] += 1.0
        self.bias.zero_()
        self.bias[..., Reuse.COMPUTE] = scale * (rank - 1.0)[:, None]
        self.bias[..., Reuse.TIMESTEP] = 0.5 * scale
        self.bias[..., Reuse.ROLLOUT] = 0.25 * scale

    def gates(self, time_tokens: Tensor) -> Tensor:
        """Gates [K, H] of the time tokens [K, D]; they depend on the step alone."""
        return self.gate(time_tokens)

    def forward(self, gates: Tensor, observation_tokens: Tensor) -> Tensor:
        """Logits [B, K, N, 4] from folded gates [K, H] and observation tokens [B, To, D]."""
        hidden = self.observation(observation_tokens.flatten(1))
        logits = (hidden[:, None] * gates) @ self.cell
        return logits.unflatten(-1, (self.spec.blocks, len(Reuse))) + self.bias
