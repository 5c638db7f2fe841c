# SPDX-License-Identifier: Apache-2.0
"""Residual blocks as an architecture declares them: how many, of which kinds, at what cost.

Plans, caches, costs, reports and pictures take the blocks of a denoiser from here and nothing
else: to them a denoiser is a list of residual blocks x <- x + y that are run in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class BlockKind:
    """Kind of a residual block; FORWARD reuse never crosses kinds. symbol: its short name."""

    name: str
    symbol: str


SELF_ATTENTION = BlockKind('self-attention', 'SA')
CROSS_ATTENTION = BlockKind('cross-attention', 'CA')
FEED_FORWARD = BlockKind('feed-forward', 'FF')


@dataclass(frozen=True)
class BlockSpec:
    """One residual block: kind, decoder layer, FLOPs of one execution.

    conditioned: whether it reads what the conditioner prepares for it before denoising begins.
    """

    kind: BlockKind
    layer: int
    flops: int
    conditioned: bool = False


@dataclass(frozen=True)
class BlockStack:
    """The residual blocks of a denoiser in the order of execution."""

    blocks: tuple[BlockSpec, ...]

    def __len__(self) -> int:
        """Number of residual blocks N."""
        return len(self.blocks)

    @cached_property
    def distinct_kinds(self) -> tuple[BlockKind, ...]:
        """The kinds there are, in the order of their first block."""
        return tuple(dict.fromkeys(block.kind for block in self.blocks))

    @cached_property
    def kinds(self) -> NDArray[np.int64]:
        """Number j of every block's kind in `distinct_kinds`, [N]."""
        number = {kind: j for j, kind in enumerate(self.distinct_kinds)}
        return np.array([number[block.kind] for block in self.blocks])

    @cached_property
    def flops(self) -> NDArray[np.int64]:
        """FLOPs of one execution of every block, [N]."""
        return np.array([block.flops for block in self.blocks])
