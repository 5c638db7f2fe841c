# SPDX-License-Identifier: Apache-2.0
"""Sources of plans: the pruner of the bundle, and what a variant uses in its place.

To the policy every source is a pruner: it maps the memory to logits. So a variant runs through the
same policy as the bundle. `flops` is the cost of a plan; `begin` starts an episode.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tts_policy.policy.bundle import AnyPruner
from tts_policy.policy.plan import Reuse, static_steps
from tts_policy.policy.pruner import Pruner, PrunerSpec

# Far below any trained logit, yet finite: a class that is off stays the last resort.
OFF = -1e6


class PlanSource(Pruner):
    """A pruner that only pretends; its own parameters, of the sizes given, are unused."""

    flops = 0

    def __init__(self, spec: PrunerSpec) -> None:
        super().__init__(spec)
        self._random = torch.Generator()

    @property
    def sparsities(self) -> tuple[float, ...]:
        """Not known: the logits may differ at every call."""
        return ()

    def begin(self, seed: int) -> None:
        """Start an episode: what the source draws depends on `seed` alone."""
        self._random.manual_seed(seed)

    def _grid(self) -> Tensor:
        return torch.zeros(1, self.spec.steps, self.spec.blocks, len(Reuse))


class Learned(PlanSource):
    """The pruner on this tick's memory."""

    def __init__(self, pruner: AnyPruner) -> None:
        spec = pruner.spec
        time_width = spec.time_width if isinstance(spec, PrunerSpec) else None
        super().__init__(
            PrunerSpec(
                spec.steps,
                spec.blocks,
                spec.memory_width,
                spec.obs_steps,
                (0.0,),
                hidden=1,
                time_width=time_width,
            )
        )
        self.pruner = pruner
        self.flops = spec.flops

    def gates(self, time_tokens: Tensor) -> Any:
        """Gates of the pruner."""
        return self.pruner.gates(time_tokens)

    def forward(self, gates: Any, observation_tokens: Tensor, sparsity: float) -> Tensor:
        """Logits [B, K, N, 4] of the pruner."""
        return self.pruner(gates, observation_tokens, sparsity)


class Without(Learned):
    """The pruner with one reuse class switched off: the cells it computes are the same."""

    def __init__(self, pruner: AnyPruner, off: Reuse) -> None:
        super().__init__(pruner)
        self._off = off

    def forward(self, gates: Any, observation_tokens: Tensor, sparsity: float) -> Tensor:
        """Logits of the pruner, the class off wherever another one is valid."""
        logits = self.pruner(gates, observation_tokens, sparsity).clone()
        before = logits[..., Reuse.FORWARD :].amax(dim=-1)
        logits[..., self._off] = OFF
        logits[..., Reuse.COMPUTE] += logits[..., Reuse.FORWARD :].amax(dim=-1) - before
        return logits


class Shuffled(Learned):
    """The pruner on the memory of another episode: tokens [M, To, D] to draw from."""

    def __init__(self, pruner: AnyPruner, tokens: Tensor) -> None:
        super().__init__(pruner)
        self._tokens = tokens

    def forward(self, gates: Any, observation_tokens: Tensor, sparsity: float) -> Tensor:
        """Logits of a memory drawn at random."""
        chosen = int(torch.randint(len(self._tokens), (), generator=self._random))
        return self.pruner(gates, self._tokens[chosen : chosen + 1], sparsity)


class Mean(Learned):
    """The pruner's mean logits over tokens [M, To, D]: a plan that does not look."""

    def __init__(self, pruner: AnyPruner, tokens: Tensor) -> None:
        super().__init__(pruner)
        self.flops = 0
        self._tokens = tokens
        self._mean: Tensor | None = None

    def forward(self, gates: Any, observation_tokens: Tensor, sparsity: float) -> Tensor:
        """Return the same logits at every tick."""
        if self._mean is None:
            self._mean = self.pruner(gates, self._tokens, sparsity).mean(0, keepdim=True)
        return self._mean


class Static(PlanSource):
    """All blocks at `count` steps, quadratically denser toward the end; TIMESTEP elsewhere."""

    def __init__(self, spec: PrunerSpec, count: int) -> None:
        super().__init__(spec)
        self._logits = self._grid()
        self._logits[..., Reuse.FORWARD] = self._logits[..., Reuse.ROLLOUT] = OFF
        self._logits[..., Reuse.COMPUTE] = -1.0
        self._logits[
            :, torch.from_numpy(static_steps(self.spec.steps, count)), :, Reuse.COMPUTE
        ] = 1.0

    def forward(self, gates: Any, observation_tokens: Tensor, sparsity: float) -> Tensor:
        """Return the same logits at every tick."""
        return self._logits


class Random(PlanSource):
    """Cells and classes drawn anew at every tick."""

    def forward(self, gates: Any, observation_tokens: Tensor, sparsity: float) -> Tensor:
        """Normally distributed logits."""
        return torch.randn(self._grid().shape, generator=self._random)
