# SPDX-License-Identifier: Apache-2.0
"""The pruner of the paper's code: a query token per residual block attends to a step's memory.

One pre-norm transformer decoder layer with ReLU over sinusoidal embeddings of the block numbers;
keys and values are a projection of the memory. The gates of denoising step i are computed from the
memory of step K - 1 - i: the published code turns the step axis of its logits round, and so its
weights were trained that way. Source: arXiv 2605.13316.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from tts_policy.policy.denoisers.attention import merge_heads, sinusoidal_embedding, split_heads
from tts_policy.policy.denoisers.transformer import CrossAttention, SelfAttention
from tts_policy.policy.plan import Reuse
from tts_policy.policy.pruner import PlanPruner
from tts_policy.policy.validation import Size, Spec, check_heads, checked


@checked('pruner')
class QueryPrunerSpec(Spec):
    """Sizes: K steps, N residual blocks, memory width D, To observation tokens, own width."""

    steps: Size
    blocks: Size
    memory_width: Size
    obs_steps: Size
    width: Annotated[Size, Field(ge=4)] = 512
    heads: Size = 8
    feed_forward: Size = 1024

    @model_validator(mode='after')
    def _check_heads(self) -> Self:
        check_heads(self.width, self.heads)
        return self

    @property
    def flops(self) -> int:
        """FLOPs of the logits of one tick, those of the step alone left out."""
        width, classes = self.width, len(Reuse)
        memory = 2 * self.obs_steps * width * (self.memory_width + 2 * width)
        attention = 4 * (1 + self.obs_steps) * width + 2 * width * width
        query = attention + 4 * width * self.feed_forward + 2 * width * classes
        return memory + self.steps * self.blocks * query


class QueryPruner(PlanPruner):
    """See the module docstring; queries and the keys and values of time tokens are folded."""

    def __init__(self, spec: QueryPrunerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.memory = nn.Linear(spec.memory_width, spec.width)
        self.self_attention = SelfAttention(spec.width, spec.heads)
        self.cross_attention = CrossAttention(spec.width, spec.heads)
        self.norm = nn.LayerNorm(spec.width)
        self.up = nn.Linear(spec.width, spec.feed_forward)
        self.down = nn.Linear(spec.feed_forward, spec.width)
        self.head = nn.Linear(spec.width, len(Reuse))

    @property
    def sparsities(self) -> tuple[float, ...]:
        """One for all: the logits do not depend on the sparsity."""
        return (0.0,)

    def gates(self, time_tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Block tokens [N, W], queries [heads, N, .], time keys and values [K, heads, 1, .].

        time_tokens: [K, D]; row i of the result is for step i.
        """
        cross = self.cross_attention
        numbers = torch.arange(self.spec.blocks, device=time_tokens.device)
        tokens = sinusoidal_embedding(numbers, self.spec.width)
        tokens = tokens + self.self_attention(tokens[None])[0]
        queries = split_heads(cross.q(cross.norm(tokens)), self.spec.heads)
        keys, values = cross.keys_values(self.memory(time_tokens.flip(0))[:, None])
        return tokens, queries, keys, values

    def forward(
        self, gates: tuple[Tensor, ...], observation_tokens: Tensor, sparsity: float
    ) -> Tensor:
        """Logits [B, K, N, 4] from folded gates and observation tokens [B, To, D].

        They are the same for every sparsity.
        """
        tokens, queries, time_keys, time_values = gates
        keys, values = self.cross_attention.keys_values(self.memory(observation_tokens))
        batch, steps = len(keys), len(time_keys)

        def every_step(time: Tensor, observation: Tensor) -> Tensor:
            """Tokens of all steps, [B, K, heads, 1 + To, .]."""
            time = time.expand(batch, -1, -1, -1, -1)
            return torch.cat([time, observation[:, None].expand(-1, steps, -1, -1, -1)], dim=3)

        attended = F.scaled_dot_product_attention(
            queries.expand(batch, steps, -1, -1, -1),
            every_step(time_keys, keys),
            every_step(time_values, values),
        )
        x = tokens + self.cross_attention.out(merge_heads(attended))
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.head(x)
